"""The structured log of a run: a line of JSON per event, for log collectors."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from mergesearch.merging.foreign.shown import all_shown
from mergesearch.search.grammar import counted
from mergesearch.search.record.trial_record import Score, TrialRecord
from mergesearch.search.redact import redacted
from mergesearch.search.study.events import Event

#: A file is moved aside at this size; so many old ones are kept.
MAX_BYTES = 20 * 2**20
BACKUPS = 3


class EventLog:
    """Writes each event as a line of JSON; lines that cannot be written are counted, not raised.

    Args:
        path: The file; appended to, and moved aside to ``path.1`` when it is full.
        study: Name of the study.
        driver: ``host:pid`` of the driver.
        max_bytes: Size at which the file is moved aside.

    Attributes:
        dropped: Lines that could not be written so far.
    """

    def __init__(self, path: Path, study: str, driver: str, *, max_bytes: int = MAX_BYTES) -> None:
        self._handler = _LineHandler(path, maxBytes=max_bytes, backupCount=BACKUPS, delay=True)
        self._head = {"study": study, "driver": driver}
        self._phase = ""
        self._unreported = 0  # lines that were dropped since the last line that says so
        self._lock = threading.Lock()
        self.dropped = 0

    def observe(self, event: Event) -> None:
        """Write the event's line, after one that says how many were dropped before it."""
        with self._lock:
            if event.kind == "phase":
                self._phase = event.text
            if self._unreported and self._write(_dropped_line(self._unreported)):
                self._unreported = 0
            if not self._write(_line(event)):
                self.dropped += 1
                self._unreported += 1

    def close(self) -> None:
        """Close the file, after a last attempt to say how many lines were dropped."""
        with self._lock:
            if self._unreported and self._write(_dropped_line(self._unreported)):
                self._unreported = 0
            with contextlib.suppress(OSError):
                self._handler.close()

    def _write(self, fields: Mapping[str, Any]) -> bool:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = {
            "time": now,
            "level": fields["level"],
            **self._head,
            "event": fields["event"],
            "phase": self._phase,
        }
        text = json.dumps(all_shown(redacted({**head, **fields})), allow_nan=False, default=str)
        try:
            self._handler.emit(logging.makeLogRecord({"msg": text}))
        except OSError:
            self._handler.reset()
            return False
        return True


class _LineHandler(RotatingFileHandler):
    """Writes whole lines or nothing, without a buffer.

    A line that a full disk refused must not appear in the file later.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Append one line.

        Raises:
            OSError: If it could not be written; nothing of it is in the file then.
        """
        if self.shouldRollover(record):
            self.doRollover()
        if self.stream is None:
            self.stream = self._open()
        _append(self.stream.fileno(), (record.getMessage() + "\n").encode())

    def reset(self) -> None:
        """Open the file anew for the next line: it may be another one, or its disk be back."""
        stream = self.stream
        self.stream = None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _append(descriptor: int, line: bytes) -> None:
    size = os.fstat(descriptor).st_size
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    except OSError:
        with contextlib.suppress(OSError):  # a device has no size to go back to
            os.ftruncate(descriptor, size)
        raise


def _line(event: Event) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "level": _level(event),
        "event": event.kind,
        "done": event.done,
        "total": event.total,
    }
    if event.kind == "score":
        fields["split"] = event.text
        assert event.record is not None
        return fields | _score_fields(event.record, event.score)
    if event.kind not in ("phase", "trial"):
        fields["message"] = event.text
    return fields if event.record is None else fields | _trial_fields(event.record)


def _level(event: Event) -> str:
    """``error`` for errors and lost workers, ``warning`` for infeasible merges and warnings.

    An infeasible merge is a result of the search like others.
    """
    failure = None if event.record is None or event.kind != "trial" else event.record.failure
    if failure is not None:
        return "warning" if failure.kind == "infeasible" else "error"
    return "warning" if event.kind == "warning" else "info"


def _trial_fields(record: TrialRecord) -> dict[str, Any]:
    failure = record.failure
    return {
        "number": record.number,
        "name": record.name,
        "kind": record.kind,
        "state": record.state,
        "values": _finite(record.values),
        "seconds": _finite(record.seconds),
        "worker": record.worker,
        "failure": None if failure is None else {"kind": failure.kind, "message": failure.message},
        **({} if record.same_as is None else {"same_as": record.same_as}),
    }


def _score_fields(record: TrialRecord, score: Score | None) -> dict[str, Any]:
    """What a re-evaluation measured; none of the scores of the search."""
    return {
        "number": record.number,
        "name": record.name,
        "kind": record.kind,
        "state": "failed" if score is None else "complete",
        "values": {} if score is None else _finite(score.values),
        "errors": {} if score is None else _finite(score.errors),
    }


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers with None for infinities and NaN, which JSON does not have."""
    return {key: float(value) if math.isfinite(value) else None for key, value in numbers.items()}


def _dropped_line(count: int) -> dict[str, Any]:
    message = f"{counted(count, 'line')} before this one could not be written"
    return {"level": "warning", "event": "dropped", "dropped": count, "message": message}
