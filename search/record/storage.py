"""Opens the storage that a trial log lives in: a journal file, or a database by its URL."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from mergesearch.merging import InputError, RunFolderError
from mergesearch.search.quiet import quiet_optuna
from mergesearch.search.record.tables import KNOWN_DIALECTS, KNOWN_VERSIONS
from mergesearch.search.redact import redact
from mergesearch.search.retry import RetryPolicy, reason
from mergesearch.search.spec.storage_url import database_url

if TYPE_CHECKING:
    import optuna
    import sqlalchemy
    from optuna.storages import RDBStorage

    from mergesearch.search.record.journal import ReadJournal, RunJournal

T = TypeVar("T")

#: Where a study is kept; a name that costs no import of Optuna.
Storage: TypeAlias = "optuna.storages.BaseStorage"

#: A server that drops packets is noticed within so many seconds, by libpq's own settings.
POSTGRES_OPTIONS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


def open_storage(location: str | Path, retry: RetryPolicy | None = None) -> Storage:
    """Open a journal file (a path) or a database's URL for writing.

    The trials of a journal are for the trial log alone: Optuna's ways do not see them.

    The caller must hold the run's driver lock: a torn last line, left by a crash in mid-append, is
    cut off here, which would destroy the append of a live writer.

    Args:
        location: Path of a journal file, or URL of a database.
        retry: How long a journal waits for room on the disk.

    Raises:
        RunFolderError: If the journal cannot be read or written.
        InputError: If the URL cannot be opened; its password is never shown.
    """
    with quiet_optuna():
        if isinstance(location, Path):
            return _open_journal(location, retry or RetryPolicy())
        return _open_database(location)


def _open_journal(path: Path, retry: RetryPolicy) -> Storage:
    """The journal of this process's own run, which nobody else writes."""
    from optuna.storages import JournalStorage

    from mergesearch.search.record.journal import RunJournal

    try:
        if path.exists() and not path.is_file():
            raise RunFolderError(
                f"{path}: expected a file, received a folder, pipe or device; move it away"
            )
        repair_journal(path)
        return JournalStorage(RunJournal(path, retry))
    except OSError as error:
        raise RunFolderError(
            f"{path}: expected a journal that can be written, received: {error}"
        ) from None


def _open_database(location: str) -> Storage:
    import optuna

    try:
        url = database_url(location)
        rdb = create_once(
            lambda: optuna.storages.RDBStorage(url, engine_kwargs=_engine_options(url))
        )
        _report_broken_connections(rdb.engine)
        return optuna.storages.get_storage(rdb)  # with its cache of finished trials
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"storage: expected an Optuna storage that can be opened, received {redact(location)}: "
            f"{type(error).__name__}; check that the server runs and its driver is installed"
        ) from None


@dataclass(frozen=True)
class StorageAccess:
    """Reads and writes of a storage that may be away for a while.

    Attributes:
        retry: How long to wait for the storage.
        guard: Called before every write; raises where this process may not write.
    """

    retry: RetryPolicy
    guard: Callable[[], None]

    def read(self, action: Callable[[], T]) -> T:
        """The result of ``action``, which may run several times."""
        import optuna

        own: tuple[type[Exception], ...] = (StorageAway, optuna.exceptions.StorageInternalError)
        transient = (*own, *_errors_of_databases())
        return self.retry(action, transient, "storage")

    def write(self, action: Callable[[], T]) -> T:
        """Write as the study's only driver; ``action`` may run several times."""

        def guarded() -> T:
            self.guard()
            return action()

        return self.read(guarded)


def _errors_of_databases() -> tuple[type[Exception], ...]:
    """What a database raises; nothing while none has been opened, which imports SQLAlchemy."""
    if "sqlalchemy" not in sys.modules:
        return ()
    from sqlalchemy.exc import SQLAlchemyError

    return (SQLAlchemyError,)


def backend_of(storage: Storage) -> RunJournal | ReadJournal | None:
    """What a storage of a journal reads and writes; None for a database."""
    from mergesearch.search.record.journal import ReadJournal, RunJournal

    backend = getattr(storage, "_backend", None)
    return backend if isinstance(backend, ReadJournal | RunJournal) else None


def database_of(storage: Storage) -> RDBStorage | None:
    """The database under an Optuna storage, where its tables are known; else None."""
    from optuna.storages import RDBStorage

    # Optuna wraps it in a cache, which has no public way to it.
    rdb = getattr(storage, "_backend", storage)
    if not isinstance(rdb, RDBStorage) or rdb.engine.name not in KNOWN_DIALECTS:
        return None
    return rdb if rdb.get_current_version() in KNOWN_VERSIONS else None


def journal_of(storage: Storage) -> Path | None:
    """The journal that a storage keeps; None for a database."""
    backend = backend_of(storage)
    return None if backend is None else backend.path


class StorageAway(Exception):
    """The connection to a database broke; whether the write reached it is not known."""


def _report_broken_connections(engine: sqlalchemy.Engine) -> None:
    """Raise :class:`StorageAway` when a connection breaks.

    Optuna would repeat the creation of a trial by itself, also where only the answer to the commit
    was lost: the trial would be there twice. It repeats only on SQLAlchemy's own errors; this one
    goes up to the trial log, which looks first whether the trial exists.
    """
    from sqlalchemy import event

    @event.listens_for(engine, "handle_error")
    def handle(context: sqlalchemy.ExceptionContext) -> None:
        unreachable = context.connection is None
        if not context.is_pre_ping and (context.is_disconnect or unreachable):
            raise StorageAway(str(context.original_exception)) from context.original_exception


def create_once(create: Callable[[], T]) -> T:
    """Create tables where they are missing.

    Of two processes that do so at the same time one fails, and tries again.
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
    """A separate database engine, for what Optuna's storage does not offer."""
    import sqlalchemy

    url = database_url(location)
    return sqlalchemy.create_engine(url, **_engine_options(url))


def _engine_options(url: str) -> dict[str, Any]:
    # A connection that broke while idle is replaced without an error.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("postgresql"):
        options["connect_args"] = dict(POSTGRES_OPTIONS)
    return options


def read_storage(location: str | Path, *, trials: bool = True) -> Storage:
    """Open a storage for reading, beside a running driver.

    Nothing is repaired or created; the right to read is enough.

    Args:
        location: Path of a journal file, or URL of a database.
        trials: Whether Optuna's ways to trials are needed; a trial log has its own, and needs less
            time and memory without.

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
        return _read_journal(location, "nothing" if trials else "trials")


def _read_database(location: str) -> Storage:
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


def _read_journal(path: Path, hidden: Literal["nothing", "trials"]) -> Storage:
    from optuna.storages import JournalStorage

    from mergesearch.search.record.journal import ReadJournal

    return JournalStorage(ReadJournal(path, hidden))


def repair_journal(path: Path) -> int:
    """Cut a torn last line off a journal, and remove a lock left by a dead writer.

    A line is torn when the writer died inside its append. The next append would join it and make
    the whole file unreadable, so it must go first. The trial it belonged to is either run again
    (its result was torn) or asked again by replay (its ask was torn).

    Returns:
        The number of bytes that were cut off.
    """
    for stale in path.parent.glob(path.name + ".lock*"):
        stale.unlink(missing_ok=True)
    return cut_torn_line(path) if path.exists() else 0


def cut_torn_line(path: Path) -> int:
    """Cut a last line without its end off a file of lines, and return how many bytes that were."""
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
