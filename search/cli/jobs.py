"""Runs studies as jobs of a Ray cluster: code and study are sent, weights are not.

Paths in the study mean the same on the cluster as here (a shared folder), or are names on the hub.
The cluster itself sets the environment variables that the storage needs (``${NAME}``,
``PGPASSWORD``): none is sent, because Ray shows the environment of jobs in its dashboard.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mergesearch.merging import InputError, StudyFailedError
from mergesearch.merging.foreign.json_text import parse_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import printable
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.workers.backends.cluster import (
    PACKAGE,
    ask_server,
    job_client,
    package_folder,
)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
#: Suffixes of files that hold weights, which are never sent.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
#: Bytes that an included file may have.
LARGEST = 20_000_000


@dataclass(frozen=True)
class Job:
    """A study on a cluster.

    Attributes:
        id: Its id, for ``status``, ``logs`` and ``stop``.
        study: Its name.
        state: ``pending``, ``running``, ``stopped``, ``succeeded`` or ``failed``.
        message: Ray's message about it.
        run: The run folder, on the cluster.
        started: Seconds since 1970, or None.
        phase, done, total: Progress of the study, by its own log.
    """

    id: str
    study: str
    state: str
    message: str
    run: str
    started: float | None
    phase: str = ""
    done: int = 0
    total: int = 0

    def lines(self) -> list[str]:
        """The study as lines of text."""
        count = f"{self.done} of {self.total}" if self.total else str(self.done)
        progress = f", {self.phase} {count}" if self.phase else ""
        ended = "" if self.state in ("running", "pending") else f": {self.message}"
        return [f"{self.id}  {self.study}  {self.state}{progress}  {self.run}{ended}"]


def submit(spec: StudySpec, address: str, run: Path, include: Sequence[Path] = ()) -> str:
    """Start a study on a cluster, or resume it there; returns the job's id.

    Args:
        spec: The resolved study.
        address: Of the cluster's job server, ``http://HOST:8265``.
        run: The run folder, on the cluster.
        include: Files and folders of code that the study needs, such as a scorer.

    Raises:
        InputError: If the cluster does not answer, or something cannot be packed.
    """
    client = _client(address)
    command = (
        f"python -m mergesearch run study.yaml --run {shlex.quote(str(run))} --address auto "
        "--progress json"
    )
    with packed(spec, include) as folder:
        request = partial(
            client.submit_job,
            entrypoint=command,
            submission_id=f"{spec.name}-{secrets.token_hex(4)}",
            runtime_env={"working_dir": str(folder)},
            metadata={"mergesearch": spec.name, "run": str(run)},
        )
        return str(ask_server(partial(_once_ready, request)))


def _once_ready(request: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Ask again while a cluster that has just started has no agent that runs drivers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return request()
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


@contextmanager
def packed(spec: StudySpec, include: Sequence[Path] = ()) -> Iterator[Path]:
    """A temporary folder with the product's code, the study and the code that it needs.

    Raises:
        InputError: If a file to include holds weights or is too large.
    """
    with tempfile.TemporaryDirectory(prefix="mergesearch-job-") as name:
        folder = Path(name)
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(package_folder(), folder / PACKAGE, ignore=ignore)
        for path in include:
            _include(path, folder)
        text = yaml.safe_dump(spec.to_dict(), sort_keys=False)
        (folder / "study.yaml").write_text(text)
        yield folder


def _include(path: Path, folder: Path) -> None:
    if not path.exists():
        raise InputError(f"--include: expected a file or folder, found nothing at {path}")
    if path.name in (PACKAGE, "study.yaml"):
        raise InputError(
            f"--include: expected a name that is not the product's own, received {path.name}; "
            "rename it"
        )
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        if file.suffix in WEIGHTS or size > LARGEST:
            raise InputError(
                f"--include: expected code, received {file} of {size:,} bytes; weights and data "
                "are not sent, put them into a folder that every node sees"
            )
    if path.is_file():
        shutil.copy2(path, folder / path.name)
    else:
        shutil.copytree(
            path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )


def jobs(address: str) -> list[Job]:
    """The studies that the cluster knows, newest last."""
    client = _client(address)
    ours = [
        details
        for details in ask_server(client.list_jobs)
        if "mergesearch" in (details.metadata or {})
    ]
    return [_job(client, details) for details in sorted(ours, key=lambda d: d.start_time or 0)]


def job(address: str, job_id: str) -> Job:
    """One study.

    Raises:
        InputError: If the cluster has no such job.
    """
    client = _client(address)
    return _job(client, _details(client, job_id))


def logs(address: str, job_id: str, follow: bool) -> Iterator[str]:
    """The output of the study's driver; with ``follow``, until it ends."""
    client = _client(address)
    _details(client, job_id)
    printed = 0
    while True:
        running = _running(client, job_id)
        text = ask_server(partial(client.get_job_logs, job_id))
        whole = text if not running else text[: text.rfind("\n") + 1]
        if len(whole) > printed:
            yield whole[printed:]
            printed = len(whole)
        if not follow or not running:
            return
        time.sleep(1.0)


def stop(address: str, job_id: str, seconds: float = 60.0) -> Job:
    """Stop a study and wait for its end; it resumes when it is submitted again.

    Raises:
        InputError: If the cluster has no such job.
        StudyFailedError: If it has not stopped in time.
    """
    client = _client(address)
    _details(client, job_id)
    ask_server(partial(client.stop_job, job_id))
    deadline = time.monotonic() + seconds
    while _running(client, job_id):
        if time.monotonic() > deadline:
            raise StudyFailedError(
                f"{job_id}: expected it to stop within {seconds:g} s; see `mergesearch logs "
                f"{job_id}`"
            )
        time.sleep(0.2)
    return job(address, job_id)


def default_address() -> str:
    """URL of the job server: ``RAY_API_SERVER_ADDRESS``, else loopback."""
    return os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)


def _client(address: str) -> Any:
    if not re.match(r"https?://", address):
        raise InputError(
            "--address: expected the cluster's job server, http://HOST:8265, received "
            f"{address!r}; `run --address` takes a cluster's own address"
        )
    return job_client(address)


def _running(client: Any, job_id: str) -> bool:
    status = ask_server(partial(client.get_job_status, job_id))
    return str(getattr(status, "value", status)) in ("PENDING", "RUNNING")


def _details(client: Any, job_id: str) -> Any:
    try:
        return client.get_job_info(job_id)
    except RuntimeError:
        raise InputError(
            f"expected the id of a job, received {job_id!r}; `mergesearch status` lists them"
        ) from None


def _job(client: Any, details: Any) -> Job:
    metadata = details.metadata or {}
    try:
        text = client.get_job_logs(details.submission_id)
    except RuntimeError:
        text = ""  # its log is gone with its node
    last = _last_event(text)
    return Job(
        id=details.submission_id,
        study=metadata.get("mergesearch", ""),
        state=str(getattr(details.status, "value", details.status)).lower(),
        message=" ".join((details.message or "").split()),
        run=metadata.get("run", ""),
        started=None if details.start_time is None else details.start_time / 1000,
        phase=last.get("phase", ""),
        done=last.get("done", 0),
        total=last.get("total", 0),
    )


def _last_event(text: str) -> dict[str, Any]:
    """The last line of progress in a driver's log."""
    for line in reversed(text.splitlines()):
        if line.startswith(('{"event": "phase"', '{"event": "trial"', '{"event": "score"')):
            try:
                node = Node(parse_json(line, "event"), "event")
                return {
                    "phase": printable(node.get("phase", "").text()),
                    "done": node.get("done", 0).integer(),
                    "total": node.get("total", 0).integer(),
                }
            except InputError:
                continue  # cut off in mid-line
    return {}
