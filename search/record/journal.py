"""A journal file with one writer, which syncs a batch of operations once.

Optuna's own file backend takes and removes a lock file, opens the file and syncs it for every
operation. A run has one driver (:mod:`mergesearch.search.record.run_folder` holds its lock), so
this one keeps the file open, and a result of several operations is synced once, by
:meth:`RunJournal.batched_writes`. The format is Optuna's, so its tools read the file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from optuna.storages.journal import BaseJournalBackend

from mergesearch.merging import RunFolderError
from mergesearch.search.record.journal_lines import (
    CREATE_TRIAL,
    JournalReader,
)
from mergesearch.search.record.journal_trials import HIDDEN, OnceFolded, TrialFold, without_ours
from mergesearch.search.retry import RetryPolicy

HIDDEN_LINE = json.dumps(HIDDEN).encode()


class ReadJournal(BaseJournalBackend):
    """A journal that is read alone, beside the driver that writes it.

    Args:
        path: The file.
        hidden: What Optuna is not shown: the trials, which a trial log reads itself, or of their
            attributes ours, which dashboards do not show.
    """

    def __init__(
        self, path: Path, hidden: Literal["nothing", "trials", "attributes"] = "nothing"
    ) -> None:
        self.path = path
        self._reader = JournalReader(path)
        self._hidden = hidden
        self._fold = OnceFolded(path)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Logs from the given one on.

        Raises:
            RunFolderError: If a line is damaged.
        """
        logs = self._reader.read_logs(log_number_from)
        if self._hidden == "trials":
            return self._fold.hide(log_number_from, logs)
        return map(without_ours, logs) if self._hidden == "attributes" else logs

    def trials(self) -> TrialFold:
        """The trials of the file.

        Raises:
            RunFolderError: If a line is damaged.
        """
        return self._fold.take()

    @property
    def settled(self) -> bool:
        """Whether everything that was appended has reached the disk: there is nothing."""
        return True

    @property
    def created(self) -> int:
        """Number of trials in the file, of all studies, where they are hidden."""
        return self._fold.created

    def append_trials(self, logs: list[dict[str, Any]]) -> None:
        """Refuse to write.

        Raises:
            RunFolderError: Always.
        """
        self.append_logs(logs)

    def batched_writes(self) -> AbstractContextManager[None]:
        """Nothing is written."""
        return contextlib.nullcontext()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Refuse to write.

        Raises:
            RunFolderError: Always; only the run's driver writes its journal.
        """
        raise RunFolderError(
            f"{self.path}: expected to be read only, received something to write; only the driver "
            "of the run writes its journal"
        )


class RunJournal(BaseJournalBackend):
    """Appends whole lines, and removes a line that could not be written whole.

    The lines of trials are hidden from Optuna: the trial log reads them itself.

    Args:
        path: The file; a torn last line must have been cut off.
        retry: How long to wait for room on the disk.
    """

    def __init__(self, path: Path, retry: RetryPolicy) -> None:
        self.path = path
        self._retry = retry
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._synced = os.fstat(self._fd).st_size
        self._unsynced = b""  # lines after the last sync, all written again after a failure
        self._reader = JournalReader(path)
        self._fold = OnceFolded(path)
        self._count = 0  # lines in the file
        self._counted = self._synced == 0  # whether their number is known
        self._unread: list[bytes] = []  # the last of them, not yet read back
        self._depth = 0  # of nested batches

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Logs from the given one on; lines of this process come from memory, not from the file.

        Raises:
            RunFolderError: If a line of an earlier session is damaged.
        """
        unread = self._unread
        self._unread = []
        if self._counted and self._count - len(unread) == log_number_from:
            yield from map(json.loads, unread)
            return
        number = log_number_from
        for log in self._fold.hide(number, self._reader.read_logs(number)):
            number += 1
            yield log
        self._count = number
        self._counted = True

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append lines, and wait for room on the disk where there is none.

        Raises:
            StudyFailedError: If there is none for too long; the file ends with a whole line.
        """
        lines = _lines(logs)
        self._append(lines, lines)

    @property
    def settled(self) -> bool:
        """Whether everything that was appended has reached the disk."""
        return not self._unsynced

    def append_trials(self, logs: list[dict[str, Any]]) -> None:
        """Append lines of trials, which Optuna does not read back.

        Raises:
            StudyFailedError: As above.
        """
        self._append(_lines(logs), [HIDDEN_LINE] * len(logs))
        self._fold.created += sum(log["op_code"] == CREATE_TRIAL for log in logs)

    @property
    def created(self) -> int:
        """Number of trials in the file, of all studies; Optuna counts their ids so."""
        return self._fold.created

    def trials(self) -> TrialFold:
        """The trials of the file.

        Raises:
            RunFolderError: If a line of an earlier session is damaged.
        """
        return self._fold.take()

    @contextlib.contextmanager
    def batched_writes(self) -> Iterator[None]:
        """Write and sync all lines appended inside once, at the end; until then none is there."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._flush()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _append(self, lines: list[bytes], shown: list[bytes]) -> None:
        self._unsynced += b"".join(lines)
        if not self._depth:
            self._flush()
        self._unread += shown
        self._count += len(lines)

    def _flush(self) -> None:
        if not self._unsynced:
            return
        try:
            self._retry(self._write, (OSError,), str(self.path))
        except BaseException:
            # Waiting has ended or was interrupted: the file must end with a whole line.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._synced)
            raise
        self._synced += len(self._unsynced)
        self._unsynced = b""

    def _write(self) -> None:
        """Write everything since the last sync: a failed fsync may have dropped any of it."""
        written = 0
        while written < len(self._unsynced):
            written += os.pwrite(self._fd, self._unsynced[written:], self._synced + written)
        os.fsync(self._fd)


def _lines(logs: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs]
