"""The folder of a run: resolved study, journal, environment, report, and the driver's lock.

::

    runs/NAME/
        study.yaml          the resolved study; running a changed one here is refused
        environment.json    versions and machine of the first session, and the devices of workers
        journal.log         the trial log (absent when the study names another storage)
        events.jsonl        what happened, a JSON line for each event
        driver.lock         held by the live driver; the kernel releases it when the driver dies
        report.html ...     written when the study ends or is stopped
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from mergesearch.merging import RunFolderError
from mergesearch.merging.checkpoints.atomic import write_atomically
from mergesearch.merging.extensions.used_plugins import UsedPlugin, demand
from mergesearch.search.spec.code import used_plugins
from mergesearch.search.spec.comparison import differences, listed
from mergesearch.search.spec.renamed import with_new_names
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.spec.study_file import validate
from mergesearch.search.workers.devices import Device, device_from

#: Packages whose version can change a result.
FINGERPRINTED = (
    *("mergesearch", "torch", "transformers", "safetensors", "numba", "numpy", "scipy"),
    *("optuna", "cma", "ray", "datasets"),
)


class RunFolder:
    """A run's folder. Opening it for writing takes the driver's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def study_file(self) -> Path:
        """The resolved study."""
        return self.path / "study.yaml"

    @property
    def journal(self) -> Path:
        """The trial log, unless the study names another storage."""
        return self.path / "journal.log"

    @property
    def arenas(self) -> Path:
        """Arena files, shared by all runs beside this one."""
        return self.path.parent / ".arenas"

    def exists(self) -> bool:
        """Whether a study was ever started here."""
        return self.study_file.is_file()

    def load(self) -> StudySpec:
        """The resolved study of an existing run.

        Raises:
            RunFolderError: If there is none.
        """
        if not self.exists():
            raise RunFolderError(
                f"{self.path}: expected the folder of a run, found no study.yaml; see `mergesearch "
                "run`"
            )
        self.check_plugins()
        recorded = yaml.safe_load(self.study_file.read_text())
        return validate(with_new_names(recorded), str(self.study_file))

    def check_plugins(self) -> None:
        """Refuse to go on without the packages that the run's study uses, in whatever version.

        Raises:
            InputError: If one is not installed.
        """
        recorded = self.environment().get("plugins", [])
        demand([UsedPlugin(**entry) for entry in recorded], str(self.path), any_version=True)

    def start(self, spec: StudySpec) -> None:
        """Create the run or reopen it, and become its driver.

        Raises:
            RunFolderError: If the folder cannot be written, another driver is active, or it holds
                another study.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self.exists():
                self._check_same(spec)
            else:
                plugins = [vars(plugin) for plugin in used_plugins(spec)]
                text = json.dumps(environment() | {"plugins": plugins}, indent=1) + "\n"
                write_atomically(self.path / "environment.json", text)
                # Last: this file is what makes the folder a run.
                write_atomically(self.study_file, yaml.safe_dump(spec.to_dict(), sort_keys=False))
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: expected a folder that can be written, received: {error.strerror}; "
                "choose another --run"
            ) from None

    def release(self) -> None:
        """Release the driver's lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def environment(self) -> dict[str, Any]:
        """Versions and machine of the first session; empty if unknown."""
        path = self.path / "environment.json"
        loaded: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return loaded

    def devices(self) -> dict[str, Device]:
        """Worker -> what it computed on, of the workers whose devices are recorded."""
        return {
            worker: device_from(entry["device"])
            for entry in self.environment().get("devices", [])
            for worker in entry["workers"]
        }

    def add_device(self, worker: str, device: Device) -> None:
        """Record what a worker computes on; workers of equal devices share an entry."""
        recorded = self.devices() | {worker: device}
        entries = [
            {
                "device": one.to_dict(),
                "workers": [name for name, other in recorded.items() if other == one],
            }
            for one in dict.fromkeys(recorded.values())
        ]
        text = json.dumps(self.environment() | {"devices": entries}, indent=1) + "\n"
        write_atomically(self.path / "environment.json", text)

    def _take_lock(self) -> None:
        path = self.path / "driver.lock"
        lock = path.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "an unknown process"
            lock.close()
            raise RunFolderError(
                f"{self.path}: expected no other driver, found {holder}; wait for it, or stop it "
                "first"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def _check_same(self, spec: StudySpec) -> None:
        changed = differences(self.load().to_dict(), spec.to_dict())
        code = [change for change in changed if ".source." in change]
        if code:
            raise RunFolderError(
                f"{self.path}: expected the functions that its trials were measured with, received "
                f"others: {listed(code)}; restore them or choose another --run"
            )
        if changed:
            raise RunFolderError(
                f"{self.path}: expected the study recorded here, received one that differs in "
                f"{listed(changed)}; restore these keys or choose another --run"
            )


def environment() -> dict[str, Any]:
    """Versions and machine, on which a result depends beside the study file."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": dict(_versions()),
    }


def _versions() -> Mapping[str, str]:
    versions = {}
    for package in FINGERPRINTED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
