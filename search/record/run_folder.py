"""The folder of a run: resolved study, journal, environment, report, and the driver's lock.

::

    runs/NAME/
        study.yaml          the resolved study; with results, budget and workers may still change
        environment.json    versions and machine of the first session, and the devices of workers
        journal.log         the trial log (absent when the study names another storage)
        events.jsonl        what happened, a JSON line for each event
        driver.lock         held by the live driver; the kernel releases it when the driver dies
        report.html ...     written when the study ends or is stopped
        artifacts/          recipes that the dashboard offers, once there is a winner
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml
from filelock import lock_descriptor

from mergesearch.merging import InputError, RunFolderError
from mergesearch.merging.checkpoints.atomic import write_atomically
from mergesearch.merging.extensions.used_plugins import UsedPlugin, demand
from mergesearch.merging.foreign.json_text import read_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import name_shown
from mergesearch.merging.foreign.yaml_text import read_yaml
from mergesearch.search.record.shapes import PLUGIN_KEYS, Environment, conform
from mergesearch.search.spec.code import used_plugins
from mergesearch.search.spec.comparison import code_changes, conflicts, differences, listed
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
        self._lock: IO[bytes] | None = None

    @property
    def study_file(self) -> Path:
        """The resolved study."""
        return self.path / "study.yaml"

    @property
    def journal(self) -> Path:
        """The trial log, unless the study names another storage."""
        return self.path / "journal.log"

    @property
    def _lock_file(self) -> Path:
        """Locked by the live driver, whose name is in it."""
        return self.path / "driver.lock"

    @property
    def arenas(self) -> Path:
        """Arena files, shared by all runs beside this one."""
        return self.path.parent / ".arenas"

    @property
    def artifacts(self) -> Path:
        """Files that the dashboard offers."""
        return self.path / "artifacts"

    def exists(self) -> bool:
        """Whether a study was ever started here."""
        return self.study_file.is_file()

    def holds(self, spec: StudySpec) -> bool:
        """Whether a study was started here that this one may be, with what may change changed."""
        return self.exists() and not conflicts(self.load().to_dict(), spec.to_dict(), mended=True)

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
        return validate(with_new_names(self.recorded()), str(self.study_file))

    def recorded(self) -> dict[str, Any]:
        """The resolved study as it is written, unchecked but for its name.

        Raises:
            RunFolderError: If the file cannot be read.
        """
        step = "restore the file, or start the run anew in another folder"
        try:
            node = Node(read_yaml(self.study_file, RunFolderError), _shown(self.study_file))
            recorded = node.mapping()
            node.at("name").text()
            if recorded.get("storage") is not None:
                node.at("storage").text()
        except InputError as error:
            raise RunFolderError(f"{error}; {step}") from None
        return recorded

    def check_plugins(self) -> None:
        """Refuse to go on without the packages that the run's study uses, in whatever version.

        Raises:
            InputError: If one is not installed.
        """
        recorded = self.environment().get("plugins", [])
        demand(
            [UsedPlugin(**{key: entry[key] for key in PLUGIN_KEYS}) for entry in recorded],
            _shown(self.path),
            any_version=True,
        )

    def start(
        self,
        spec: StudySpec,
        give_up: Callable[[StudySpec], bool] = lambda recorded: False,
        *,
        mended: bool = False,
    ) -> StudySpec:
        """Create the run or reopen it, and become its driver.

        Args:
            spec: The study as it is given now; its budget may differ from the recorded one.
            give_up: Called with the recorded study where another is given; whether it makes way.
            mended: Whether the functions of evaluators may have other code.

        Returns:
            The recorded study.

        Raises:
            RunFolderError: If the folder cannot be written, another driver is active, or it holds
                another study.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            recorded = self.load() if self.exists() else None
            if recorded is not None and conflicts(
                recorded.to_dict(), spec.to_dict(), mended=mended
            ):
                if not give_up(recorded):
                    self._refuse(recorded, spec)
                recorded = None
            if recorded is None:
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
        return recorded or spec

    def renew(self, spec: StudySpec) -> None:
        """Record what the study may spend now, and the code of its evaluators."""
        recorded = self.load()
        now = recorded.model_copy(update={"budget": spec.budget, "evaluators": spec.evaluators})
        if now != recorded:
            write_atomically(self.study_file, yaml.safe_dump(now.to_dict(), sort_keys=False))

    def hold(self) -> None:
        """Take the driver's lock of an existing run, so that nobody else writes it.

        Raises:
            RunFolderError: If another driver is active, or the folder cannot be written.
        """
        try:
            self._take_lock()
        except OSError as error:
            raise RunFolderError(
                f"{_shown(self.path)}: expected a folder that can be written, received: "
                f"{error.strerror}"
            ) from None

    def release(self) -> None:
        """Release the driver's lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def environment(self) -> dict[str, Any]:
        """Versions and machine of the first session; empty if unknown.

        Raises:
            RunFolderError: If the file is damaged.
        """
        path = self.path / "environment.json"
        if not path.exists():
            return {}
        step = "remove the file: it only says where the run was measured, and with which plug-ins"
        try:
            data = read_json(path, RunFolderError)
            known: dict[str, Any] = conform(Environment, data, _shown(path))
        except RunFolderError as error:
            raise RunFolderError(f"{error}; {step}") from None
        return known

    def driver(self) -> str | None:
        """The process that drives the run now; None where none does."""
        if not self._lock_file.is_file():  # a pipe would wait for ever
            return None
        try:
            with self._lock_file.open("rb") as lock:
                free = lock_descriptor(lock.fileno(), blocking=False)
                return None if free else _holder(lock)
        except OSError:  # a file system that lets nobody look
            return None

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
        if self._lock_file.exists() and not self._lock_file.is_file():
            raise RunFolderError(
                f"{self._lock_file}: expected a file, received a folder, pipe or device; move it "
                "away"
            )
        lock = self._lock_file.open("ab+")
        # Whoever looks for a driver holds the lock for an instant.
        for pause in (0.02, 0.1, 0.3, 0.0):
            if lock_descriptor(lock.fileno(), blocking=False):
                break
            time.sleep(pause)
        else:
            holder = _holder(lock)
            lock.close()
            raise RunFolderError(
                f"{self.path}: expected no other driver, found {holder}; wait for it, or stop it "
                "first"
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        lock.flush()
        self._lock = lock

    def _refuse(self, recorded: StudySpec, spec: StudySpec) -> NoReturn:
        changed = differences(recorded.to_dict(), spec.to_dict())
        code = code_changes(changed)
        if code:
            raise RunFolderError(
                f"{self.path}: expected the functions that its trials were measured with, received "
                f"others: {listed(code)}; restore them or choose another --run (--retry-failed "
                "accepts functions that were mended for trials that failed)"
            )
        raise RunFolderError(
            f"{self.path}: expected the study recorded here, received one that differs in "
            f"{listed(changed)}; restore these keys or choose another --run (with results, only "
            "budget, workers, driver and trackers may change)"
        )


def _holder(lock: IO[bytes]) -> str:
    """Who holds the lock, by the file that is locked."""
    lock.seek(0)
    return name_shown(lock.read(200).decode(errors="replace").strip()) or "an unknown process"


def _shown(path: Path) -> str:
    return name_shown(str(path), 200)


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
