"""Opens the storage that a trial log lives in: a journal file, or a database by its URL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mergesearch.merging import InputError, RunFolderError
from mergesearch.search.quiet import quiet_optuna
from mergesearch.search.redact import redact
from mergesearch.search.retry import RetryPolicy, reason
from mergesearch.search.spec.storage_url import database_url

if TYPE_CHECKING:
    import optuna
    import sqlalchemy

    Storage = optuna.storages.BaseStorage


T = TypeVar("T")

#: A server that drops packets is noticed within so many seconds, by libpq's own settings.
POSTGRES_OPTIONS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


def open_storage(
    location: str | Path, patience: RetryPolicy | None = None
) -> optuna.storages.BaseStorage:
    """Open a journal file (a path) or a database's URL for writing.

    The caller must hold the run's driver lock: a torn last line, left by a crash in mid-append, is
    cut off here, which would destroy the append of a live writer.

    Raises:
        RunFolderError: If the journal cannot be read or written.
        InputError: If the URL cannot be opened; its password is never shown.
    """
    import optuna

    with quiet_optuna():
        if isinstance(location, Path):
            try:
                repair_journal(location)
                return _own_journal(location, patience or RetryPolicy())
            except OSError as error:
                raise RunFolderError(
                    f"{location}: expected a journal that can be written, received: {error}"
                ) from None
        try:
            url = database_url(location)
            rdb = create_once(
                lambda: optuna.storages.RDBStorage(url, engine_kwargs=_engine_options(url))
            )
            _report_breaks(rdb.engine)
            return optuna.storages.get_storage(rdb)  # with its cache of finished trials
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                "storage: expected an Optuna storage that can be opened, received "
                f"{redact(location)}: "
                f"{type(error).__name__}; check that the server runs and its driver is installed"
            ) from None


class StorageAway(Exception):
    """The connection to a database broke; whether what was being written is in it, is not known."""


def _report_breaks(engine: sqlalchemy.Engine) -> None:
    """Raise :class:`StorageAway` when a connection breaks.

    Optuna would repeat the creation of a trial by itself, also where only the answer to the commit
    was lost: the trial would be there twice. Its repetition is for SQLAlchemy's own errors; this
    one goes up to who can look first.
    """
    from sqlalchemy import event

    @event.listens_for(engine, "handle_error")
    def handle(context: sqlalchemy.ExceptionContext) -> None:
        unreachable = context.connection is None
        if not context.is_pre_ping and (context.is_disconnect or unreachable):
            raise StorageAway(str(context.original_exception)) from context.original_exception


def create_once(create: Callable[[], T]) -> T:
    """Do what creates tables where they are missing; of two that do so at a time one fails, and is
    done again.
    """
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    for pause in (0.2, 0.5, 1.0, 2.0):
        try:
            return create()
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            if "already exists" not in str(error) and "duplicate key" not in str(error):
                raise
            time.sleep(pause)
    return create()


def open_engine(location: str) -> sqlalchemy.Engine:
    """A database engine of its own, with one connection, for what Optuna's storage does not
    offer.
    """
    import sqlalchemy

    url = database_url(location)
    return sqlalchemy.create_engine(url, **_engine_options(url))


def _engine_options(url: str) -> dict[str, Any]:
    # A connection that broke while idle is replaced without an error.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("postgresql"):
        options["connect_args"] = dict(POSTGRES_OPTIONS)
    return options


def read_storage(location: str | Path) -> optuna.storages.BaseStorage:
    """Open for reading beside a running driver: nothing is repaired or created; the right to read
    is enough.

    Raises:
        RunFolderError: If there is no journal, or no study was ever started in the database.
        InputError: If the database cannot be reached.
    """
    if not isinstance(location, Path):
        return _read_database(location)
    if not location.is_file():
        raise RunFolderError(
            f"{location}: expected the journal of a run, found none; see `mergesearch run`"
        )
    with quiet_optuna():
        return _journal(location)


def _read_database(location: str) -> optuna.storages.BaseStorage:
    import optuna
    import sqlalchemy
    from sqlalchemy.exc import SQLAlchemyError

    url = database_url(location)
    missing = (
        location.startswith("sqlite:///") and not Path(location.removeprefix("sqlite:///")).exists()
    )
    try:
        engine = sqlalchemy.create_engine(url, **_engine_options(url))
        if missing or not sqlalchemy.inspect(engine).has_table("studies"):
            raise RunFolderError(
                f"{redact(location)}: expected a database with studies, found none; see "
                "`mergesearch run`"
            )
        engine.dispose()
        with quiet_optuna():
            rdb = optuna.storages.RDBStorage(
                url, engine_kwargs=_engine_options(url), skip_table_creation=True
            )
            return optuna.storages.get_storage(rdb)
    except SQLAlchemyError as error:
        raise InputError(
            f"storage: expected a database that can be read, received {redact(location)}: "
            f"{redact(reason(error))}; check that the server runs"
        ) from None


def _own_journal(path: Path, patience: RetryPolicy) -> optuna.storages.JournalStorage:
    """The journal of this process's own run, which nobody else writes."""
    from optuna.storages import JournalStorage

    from mergesearch.search.record.journal import RunJournal

    return JournalStorage(RunJournal(path, patience))


def _journal(path: Path) -> optuna.storages.JournalStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    return JournalStorage(
        JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path), grace_period=5))
    )


def repair_journal(path: Path) -> int:
    """Cut a torn last line off a journal and remove a lock left by a dead writer; returns the bytes
    cut.

    A line is torn when the writer died inside its append. The next append would join it and make
    the whole file unreadable, so it must go first. The trial it belonged to is either run again
    (its result was torn) or asked again by replay (its ask was torn).
    """
    for stale in path.parent.glob(path.name + ".lock*"):
        stale.unlink(missing_ok=True)
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        kept = _end_of_last_line(file, size)
        if kept < size:
            file.truncate(kept)
            os.fsync(file.fileno())
    return size - kept


def _end_of_last_line(file: Any, size: int) -> int:
    """Position after the last newline, reading backwards."""
    block = 1 << 16
    end = size
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return int(start + newline + 1)
        end = start
    return 0
