"""One active driver per study of a shared database, without comparing any clocks.

A driver holds the study's row in the table ``mergesearch_lease`` and raises its ``beat`` every few
seconds. Another driver that finds a holder watches the beat by its own monotonic clock: if it
moves, the holder lives and the newcomer is refused; if it has not moved for as long as the holder
promised, the holder is dead and its row is taken over. Rows change hands by compare-and-swap, so of
two newcomers one wins. Clocks that differ by hours change nothing.

A driver whose beat was late (a partition, a stopped process) proves that it still holds the row
before it writes again; one that lost it stops. What remains is a write in the instant between proof
and write, which the storage refuses where it would matter: a finished trial cannot be finished
again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging import RunFolderError, StudyFailedError
from mergesearch.search.record.storage import create_once
from mergesearch.search.retry import reason

if TYPE_CHECKING:
    import sqlalchemy as sa

#: Beats in the time after which a silent holder is taken for dead.
BEATS = 12


@dataclass(frozen=True)
class Holder:
    """A process that drives a study.

    Attributes:
        name: ``process PID on HOST``, for people.
        process: ``MACHINE:PID``, to see whether it still runs.
    """

    name: str
    process: str

    @classmethod
    def here(cls) -> Holder:
        """The holder that is this process."""
        return cls(
            f"process {os.getpid()} on {socket.gethostname()}", f"{_machine()}:{os.getpid()}"
        )

    @property
    def known_dead(self) -> bool:
        """Whether the process ran on this very machine and is gone."""
        machine, _, pid = self.process.rpartition(":")
        return bool(machine) and machine == _machine() and not Path(f"/proc/{pid}").exists()


def _machine() -> str:
    """Name of this boot of the kernel and this namespace of process ids; empty if unknown.

    Within it, a pid means one process at a time.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Lease:
    """The right to drive a study.

    Args:
        engine: A database engine of its own; closed with the lease.
        study: Name of the study.
        seconds: Silence after which this driver may be taken for dead.
        warn: Called with what is being waited for.
        holder: Who takes the lease; this process by default.
    """

    def __init__(
        self,
        engine: sa.Engine,
        study: str,
        seconds: float,
        warn: Callable[[str], None] = lambda text: None,
        *,
        holder: Holder | None = None,
    ) -> None:
        self._engine = engine
        self._study = study
        self._seconds = seconds
        self._warn = warn
        self._holder = holder or Holder.here()
        self._token = uuid.uuid4().hex
        self._table = _table()
        self._confirmed = 0.0
        self._lost = ""
        self._released = threading.Event()
        self._renewing = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self) -> None:
        """Become the study's driver, after waiting for a silent holder's lease to expire.

        Raises:
            RunFolderError: If another driver is alive; names it.
        """
        create_once(lambda: self._table.create(self._engine, checkfirst=True))
        while not self._try_to_take():
            pass
        self._confirmed = time.monotonic()
        self._thread.start()

    def check(self) -> None:
        """Make sure that this driver may write.

        Raises:
            StudyFailedError: If another driver has taken the study over.
        """
        if not self._lost and time.monotonic() - self._confirmed > self._seconds / 2:
            self.renew()
        if self._lost:
            raise StudyFailedError(
                f"study {self._study!r}: expected to be its only driver, found {self._lost}, which "
                "took it over while this one was silent; no recorded result is lost, leave the "
                "study to that driver"
            )

    def renew(self) -> None:
        """Raise the beat, or notice that the row has another holder.

        Raises:
            SQLAlchemyError: If the database cannot be reached.
        """
        table = self._table
        ours = (table.c.study == self._study) & (table.c.token == self._token)
        with self._renewing, self._engine.begin() as connection:
            began = time.monotonic()
            raised = connection.execute(
                table.update().where(ours).values(beat=table.c.beat + 1)
            ).rowcount
            if raised:
                self._confirmed = began
            elif not self._released.is_set():
                row = self._row(connection)
                self._lost = "another driver" if row is None or not row.holder else row.holder

    def release(self) -> None:
        """Let the next driver begin at once."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(5)
        table = self._table
        ours = (table.c.study == self._study) & (table.c.token == self._token)
        # Where the database cannot be reached, the lease expires by itself.
        with contextlib.suppress(Exception), self._engine.begin() as connection:
            connection.execute(table.update().where(ours).values(holder="", place="", token=""))
        self._engine.dispose()

    def _try_to_take(self) -> bool:
        """Insert the row, or swap a dead holder's; False if another driver was faster."""
        from sqlalchemy.exc import IntegrityError

        with self._engine.begin() as connection:
            row = self._row(connection)
        if row is None:
            try:
                with self._engine.begin() as connection:
                    connection.execute(
                        self._table.insert().values(study=self._study, beat=0, **self._ours())
                    )
            except IntegrityError:
                return False
            return True
        if row.token and not Holder(row.holder, row.place).known_dead:
            self._wait_out(row)
        table = self._table
        as_seen = (
            (table.c.study == self._study)
            & (table.c.token == row.token)
            & (table.c.beat == row.beat)
        )
        with self._engine.begin() as connection:
            swap = table.update().where(as_seen).values(beat=table.c.beat + 1, **self._ours())
            return bool(connection.execute(swap).rowcount)

    def _wait_out(self, seen: Any) -> None:
        """Watch a holder for as long as it promised to beat within.

        Raises:
            RunFolderError: If it beats: it is alive.
        """
        began = time.monotonic()
        warned = False
        while (waited := time.monotonic() - began) < seen.seconds:
            if not warned and waited > 2 * seen.seconds / BEATS:
                self._warn(
                    f"{seen.holder} is silent; its lease of study {self._study!r} expires within "
                    f"{seen.seconds:g} s"
                )
                warned = True
            time.sleep(min(0.25, seen.seconds / BEATS))
            with self._engine.begin() as connection:
                row = self._row(connection)
            if row is None or not row.token:
                return
            if (row.token, row.beat) != (seen.token, seen.beat):
                raise RunFolderError(
                    f"study {self._study!r}: expected no other driver, found {row.holder}; wait "
                    "for it, or stop it first"
                )

    def _ours(self) -> dict[str, Any]:
        return {
            "holder": self._holder.name,
            "place": self._holder.process,
            "token": self._token,
            "seconds": self._seconds,
        }

    def _row(self, connection: sa.Connection) -> Any:
        return connection.execute(
            self._table.select().where(self._table.c.study == self._study)
        ).one_or_none()

    def _beat(self) -> None:
        while not self._released.wait(self._seconds / BEATS):
            # An unreachable database: nobody else can take the lease either, and writes check it
            # first.
            with contextlib.suppress(Exception):
                self.renew()
            if self._lost:
                return


def holder_of(engine: sa.Engine, study: str) -> str | None:
    """Name of the holder of a study, alive or not; None if there is none."""
    import sqlalchemy as sa

    table = _table()
    try:
        with engine.connect() as connection:
            row = connection.execute(table.select().where(table.c.study == study)).one_or_none()
    except sa.exc.DBAPIError as error:
        if sa.inspect(engine).has_table(table.name):
            raise StudyFailedError(f"{table.name}: {reason(error)}") from None
        return None
    return row.holder if row is not None and row.token else None


def _table() -> sa.Table:
    import sqlalchemy as sa

    return sa.Table(
        "mergesearch_lease",
        sa.MetaData(),
        sa.Column("study", sa.String(512), primary_key=True),
        sa.Column("holder", sa.String(256), nullable=False),
        sa.Column("place", sa.String(256), nullable=False),
        sa.Column("token", sa.String(64), nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("beat", sa.BigInteger, nullable=False),
    )
