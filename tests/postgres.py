"""A PostgreSQL server of the tests: installed programs, loopback, never root."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.waiting import wait_for

USER = "mergesearch"


def programs() -> Path | None:
    """Folder of ``initdb`` and ``postgres``."""
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which("initdb")
    places += [] if found is None else [Path(found).parent]
    return next(
        (
            place
            for place in places
            if (place / "initdb").exists() and (place / "postgres").exists()
        ),
        None,
    )


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A server that can be stopped, killed and started again on its data."""

    bin: Path
    folder: Path
    port: int
    password: str = field(default_factory=lambda: secrets.token_urlsafe(12), repr=False)
    process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """Make the data folder and the database."""
        (self.folder / "password").write_text(self.password)
        if os.geteuid() == 0:
            user = _account()
            for path in (self.folder, self.folder / "password"):
                os.chown(path, user.pw_uid, user.pw_gid)
        self._run(
            "initdb",
            "-D",
            f"{self.folder}/data",
            "-U",
            USER,
            "--auth=scram-sha-256",
            f"--pwfile={self.folder}/password",
        )
        self.start()
        with psycopg.connect(self.address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {USER}")

    def start(self) -> None:
        """Start and wait until it answers."""
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.folder),
            "max_connections": "50",
            "shared_buffers": "32MB",
        }
        settings = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [self.bin / "postgres", "-D", f"{self.folder}/data", "-p", str(self.port), *settings],
            stdout=log, stderr=log, cwd=self.folder, start_new_session=True, **_identity(),
        )  # fmt: skip
        wait_for(self._answers, self.process, (self.folder / "log").read_text, 0.05)

    def _answers(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(self.address("postgres"), connect_timeout=10).close()
            return True
        return False

    def stop(self, signum: int = signal.SIGQUIT) -> None:
        """Stop; SIGQUIT is an immediate shutdown, from which the next start recovers."""
        if self.process is not None:
            self.process.send_signal(signum)
            self.process.wait(30)
            self.process = None

    def address(self, database: str = USER, port: int | None = None) -> str:
        """libpq's own form, with the password."""
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{port or self.port}/{database}"

    def url(self, port: int | None = None, database: str = USER) -> str:
        """Storage URL without the password, which PGPASSWORD carries."""
        return f"postgresql://{USER}@127.0.0.1:{port or self.port}/{database}"

    def database(self) -> str:
        """Name of a new, empty database."""
        name = f"d{secrets.token_hex(6)}"
        with psycopg.connect(self.address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return name

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.bin / program), *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            **_identity(),
        )
        assert done.returncode == 0, done.stderr


def _account() -> pwd.struct_passwd:
    """The account of the server: PostgreSQL refuses to run as root."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise AssertionError("expected an account that is not root")


def _identity() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    user = _account()
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """A running server with an empty database; PGPASSWORD is set meanwhile."""
    bin_folder = programs()
    if bin_folder is None:
        pytest.skip("PostgreSQL is not installed; .ci/run installs it")
    folder = Path(tempfile.mkdtemp(prefix="mergesearch-postgres-"))
    folder.chmod(0o755)
    server = Server(bin_folder, folder, free_port())
    before = os.environ.get("PGPASSWORD")
    try:
        server.create()
        os.environ["PGPASSWORD"] = server.password
        yield server
    finally:
        server.stop()
        if before is None:
            os.environ.pop("PGPASSWORD", None)
        else:
            os.environ["PGPASSWORD"] = before
        shutil.rmtree(folder, ignore_errors=True)


class Gate:
    """A way to the server that can be cut, as if the network were gone."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = free_port()
        self._pairs: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.open()

    def open(self) -> None:
        """Let connections through."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Break every connection and refuse new ones."""
        listener = self._listener
        self._listener = None
        if listener is not None:
            # A thread in accept() keeps the port open until it is woken.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for end in self._pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._pairs = []

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._pairs += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
