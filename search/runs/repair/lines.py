"""The lines of a damaged journal: those that stand, and what is known of the others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergesearch.merging import RunFolderError
from mergesearch.search.record.journal_lines import (
    CREATE_STUDY,
    CREATE_TRIAL,
    DELETE_STUDY,
    check_alone,
    lines_from,
    parse_line,
)

#: Where an operation begins; in texts inside one the marks are escaped.
_BEGINNING = re.compile(rb'\{"op_code"')
_TRIAL = re.compile(rb'"trial_id": ?(\d{1,9})\b')
_CREATES = re.compile(rb'"op_code": ?4\b|mergesearch:asked')
_FACT = re.compile(rb'"mergesearch:([a-z][a-z0-9: ]{1,60})"')


@dataclass(frozen=True)
class Line:
    """A line that stands.

    Attributes:
        number: From 1; two operations that share a line have the same.
        log: The operation.
    """

    number: int
    log: dict[str, Any]

    @property
    def code(self) -> int:
        """Of the operation."""
        return int(self.log["op_code"])

    @property
    def trial(self) -> int:
        """The trial that it changes."""
        return int(self.log["trial_id"])


@dataclass(frozen=True)
class Damage:
    """A line that cannot be kept.

    Attributes:
        number: From 1.
        reason: What is wrong with it.
        trial: The trial that it changed, as far as that can be read.
        creates: Whether it seems to create a trial.
        fact: The attribute of the study that it set, as far as that can be read.
        repeated: Whether all of it stands in the operation that follows: a write that was begun,
            and made again.
    """

    number: int
    reason: str
    trial: int | None = None
    creates: bool = False
    fact: str = ""
    repeated: bool = False


def read_lines(path: Path) -> list[Line | Damage]:
    """The lines of a journal in order, whole or not.

    Raises:
        RunFolderError: If the file cannot be read.
    """
    found: list[Line | Damage] = []
    for number, line in enumerate(lines_from(path, 0, torn=True), start=1):
        found += _read(line, number)
    return found


def _read(line: bytes, number: int) -> Iterator[Line | Damage]:
    """A line, or where it is damaged the operations that stand in it and what lies between."""
    try:
        yield _operation(line, number)
        return
    except RunFolderError as error:
        reason = str(error)
    starts = [found.start() for found in _BEGINNING.finditer(line)]
    for start, stop in zip([0, *starts], [*starts, len(line)], strict=True):
        part = line[start:stop]
        repeated = line[stop:].startswith(part) and bool(part)
        whole = None if start == 0 and stop == len(line) else _whole(part, number)
        if whole is not None:
            yield whole
        elif part.strip():
            yield replace(_damage(part, number, reason), repeated=repeated)


def _operation(line: bytes, number: int) -> Line:
    where = f"line {number}"
    log = parse_line(line, where)
    code = check_alone(log, where, deep=True)
    if code == DELETE_STUDY or (code not in (CREATE_STUDY, DELETE_STUDY) and log.get("study_id")):
        raise RunFolderError(f"{where}: expected the study of this run alone, received another's")
    return Line(number, log)


def _whole(part: bytes, number: int) -> Line | None:
    """The operation that a part of a line begins with, or None."""
    try:
        value, _ = json.JSONDecoder().raw_decode(part.decode("utf-8", "replace"))
        return _operation(json.dumps(value).encode(), number)
    except (ValueError, RecursionError, RunFolderError):
        return None


def _damage(part: bytes, number: int, reason: str) -> Damage:
    trial = _TRIAL.search(part)
    fact = None if trial else _FACT.search(part)
    return Damage(
        number,
        reason,
        None if trial is None else int(trial[1]),
        trial is None and _CREATES.search(part) is not None,
        "" if fact is None else fact[1].decode(),
    )


def creates_trial(line: Line) -> bool:
    """Whether a line creates a trial."""
    return line.code == CREATE_TRIAL
