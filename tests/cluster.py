"""A Ray cluster on this machine: real ``ray start`` processes, each with its own folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.postgres import free_port
from tests.waiting import PATIENT, wait_for

RAY = str(Path(sys.executable).parent / "ray")
ROOT = Path(__file__).parents[1]


@dataclass
class Cluster:
    """Nodes by name; ``head`` is the first."""

    folder: Path
    environment: dict[str, str]
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """For drivers."""
        return f"127.0.0.1:{self.port}"

    @property
    def server(self) -> str:
        """For jobs."""
        return f"http://127.0.0.1:{self.dashboard}"

    def start(self, name: str, cpus: int, *options: str) -> None:
        """Start a node and return at once; the first one is the head, and is waited for."""
        head = not self.nodes
        where = [
            "--head",
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard}",
            "--dashboard-host=127.0.0.1",
        ]
        if not head:
            where = [f"--address={self.address}"]
        command = [
            RAY,
            "start",
            *where,
            f"--num-cpus={cpus}",
            "--object-store-memory=100000000",
            "--block",
        ]
        command += ["--include-log-monitor=false"]  # no driver asks for its workers' output
        if head:
            command += ["--no-monitor"]  # which would start and stop machines
        # Ray's nodes share files below their folder; on one machine each needs its own.
        command += [f"--temp-dir={self.folder / name}", "--disable-usage-stats", *options]
        # Each node's agent, which starts jobs, has one port by default, whatever else runs on the
        # machine.
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        log = (self.folder / f"{name}.log").open("ab")
        self.nodes[name] = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
        )
        if head:
            self._await_head()

    def kill(self, name: str) -> None:
        """SIGKILL everything of a node, as when its machine loses power."""
        process = self.nodes.pop(name)
        family = [
            psutil.Process(process.pid),
            *psutil.Process(process.pid).children(recursive=True),
        ]
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.kill()
        process.wait()

    def stop(self) -> None:
        """Stop every node."""
        processes = list(self.nodes.values())
        for process in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        for left in self.processes():
            with contextlib.suppress(psutil.Error):
                left.kill()
        self.nodes = {}

    def processes(self) -> list[psutil.Process]:
        """All processes of this cluster, by the token file that their environment names."""
        mark = self.environment["RAY_AUTH_TOKEN_PATH"]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    process.environ().get("RAY_AUTH_TOKEN_PATH") == mark
                    and process.pid != os.getpid()
                ):
                    found.append(process)
        return found

    def _await_head(self) -> None:
        (head,) = self.nodes.values()
        wait_for(self._healthy, head, (self.folder / "head.log").read_text)

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"{self.server}/api/gcs_healthz", timeout=10)
            return True
        return False


@contextlib.contextmanager
def running(**environment: str) -> Iterator[Cluster]:
    """A cluster without nodes yet; tokens on, as Ray's default is."""
    # Short: Ray makes sockets below it, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ms-"))
    token = folder / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "15",
        # Processes that Ray starts in advance lack the code that drivers send, and wait in vain.
        "RAY_prestart_worker_first_driver": "0",
        "TMPDIR": str(folder),
    }
    cluster = Cluster(folder, {**os.environ, **variables, **environment})
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def mergesearch(
    cluster: Cluster, *arguments: str, **options: object
) -> subprocess.CompletedProcess[str]:
    """The command line, in the cluster's environment."""
    command = [sys.executable, "-m", "mergesearch", *arguments]
    settings = {
        "capture_output": True,
        "text": True,
        "timeout": PATIENT,
        "cwd": ROOT,
        "env": cluster.environment,
    } | options
    return subprocess.run(command, **settings)
