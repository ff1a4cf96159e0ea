"""The lines of a journal, each parsed and checked before Optuna sees it.

Optuna's own reader takes every line for one that it wrote itself. Here a damaged line is named with
its number, what is wrong with it, and how to go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergesearch.merging import RunFolderError
from mergesearch.merging.foreign.json_text import parse_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.reading import MIB, decode
from mergesearch.merging.foreign.shown import name_shown, shown
from mergesearch.search.record.attributes import (
    ASKED,
    check_study_attribute,
    check_trial_attribute,
)
from mergesearch.search.record.journal_shapes import SHAPES
from mergesearch.search.record.shapes import conform

#: The longest line that is read; one of 10^7 scores has about 60 MB.
LINE_LIMIT = 512 * MIB

#: Codes of operations; their numbers are Optuna's.
CREATE_STUDY = 0
DELETE_STUDY = 1
SET_STUDY_ATTRIBUTE = (2, 3)
CREATE_TRIAL = 4
SET_STATE = 6
SET_TRIAL = (5, 6, 7, 8, 9)
DISCARD_TRIALS = 10
#: The state of a trial that has no result yet.
RUNNING = 0
SYSTEM_ATTRIBUTE_OF_STUDY = 3
SYSTEM_ATTRIBUTE_OF_TRIAL = 9


class LineCheck:
    """Follows a journal line by line, and refuses lines that do not fit those before.

    Args:
        deep: Whether attributes of ours are read too, which costs as much as opening the run.
    """

    def __init__(self, *, deep: bool = False) -> None:
        self._deep = deep
        self._studies: dict[int, str] = {}
        self._begun = 0  # studies so far, also those that were deleted
        self._trials = 0

    def add(self, log: Any, where: str) -> None:
        """Check the next line.

        Raises:
            RunFolderError: With what was expected and received.
        """
        code = check_alone(log, where, deep=self._deep)
        if code == CREATE_STUDY:
            self._add_study(log["study_name"])
        elif code < SET_TRIAL[0] and log["study_id"] not in self._studies:
            raise RunFolderError(
                f"{where}: expected a study of the lines before, received {shown(log['study_id'])}"
            )
        elif code == DELETE_STUDY:
            del self._studies[log["study_id"]]
        elif code == CREATE_TRIAL:
            self._trials += 1
        elif code in SET_TRIAL and log["trial_id"] >= self._trials:
            raise RunFolderError(
                f"{where}: expected a trial of the {self._trials} in the lines before, received "
                f"{shown(log['trial_id'])}"
            )

    def _add_study(self, name: str) -> None:
        if name not in self._studies.values():  # Optuna ignores a second one
            self._studies[self._begun] = name
            self._begun += 1


def check_alone(log: Any, where: str, *, deep: bool) -> int:
    """Check a line without those before it.

    Args:
        log: The line as JSON.
        where: File and line, as errors name them.
        deep: Whether attributes of ours are read too.

    Returns:
        The code of its operation.

    Raises:
        RunFolderError: With what was expected and received.
    """
    code = Node(log, where, RunFolderError).at("op_code").integer(0, 10)
    conform(SHAPES[code], log, where)
    if code == CREATE_TRIAL:
        _check_trial(log, where)
    elif code == SET_STATE:
        _check_state(log, where)
    elif code == SET_TRIAL[0]:
        _check_distribution(log["distribution"], where)
    if deep:
        _check_attributes(code, log, where)
    return code


def _check_trial(log: Any, where: str) -> None:
    for key in ("datetime_start", "datetime_complete"):
        if log.get(key) is not None:
            _check_time(log[key], where)
    distributions = log.get("distributions", {})
    for text in distributions.values():
        _check_distribution(text, where)
    if log.get("params", {}).keys() - distributions.keys():
        raise RunFolderError(f"{where}: expected a distribution for each parameter, received fewer")
    if log.get("value") is not None and log.get("values") is not None:
        raise RunFolderError(f"{where}: expected value or values, received both")


def _check_state(log: Any, where: str) -> None:
    finished = log["state"] in (1, 2, 3)
    if finished or log["state"] == 0:
        key = "datetime_complete" if finished else "datetime_start"
        _check_time(Node(log, where, RunFolderError).at(key).value, where)


def _check_time(text: str, where: str) -> None:
    try:
        datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError):
        raise RunFolderError(
            f"{where}: expected a moment such as 2026-01-31T12:00:00+00:00, received "
            f"{shown(text, 40)}"
        ) from None


def _check_distribution(text: str, where: str) -> None:
    if not _is_distribution(text):
        raise RunFolderError(f"{where}: expected a distribution, received {shown(text, 40)}")


@lru_cache(maxsize=1024)  # studies have few, and repeat them for every trial
def _is_distribution(text: str) -> bool:
    """Whether Optuna reads a text as the distribution of numbers."""
    from optuna.distributions import FloatDistribution, IntDistribution, json_to_distribution

    try:
        read = json_to_distribution(text)
        return isinstance(read, FloatDistribution | IntDistribution)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return False


def _check_attributes(code: int, log: Any, where: str) -> None:
    if code == SYSTEM_ATTRIBUTE_OF_STUDY:
        for key, value in log["system_attr"].items():
            check_study_attribute(key, value, where)
    elif code in (CREATE_TRIAL, SYSTEM_ATTRIBUTE_OF_TRIAL):
        attributes = log.get("system_attrs" if code == CREATE_TRIAL else "system_attr", {})
        if code == CREATE_TRIAL:
            Node(attributes, where, RunFolderError).at(ASKED)
            _check_running(log.get("state", RUNNING), where)
        for key, value in attributes.items():
            check_trial_attribute(key, value, where)


def _check_running(state: int, where: str) -> None:
    """Refuse a trial that has ended before it began; a result is always told later."""
    if state != RUNNING:
        raise RunFolderError(
            f"{where}: state: expected {RUNNING}, which a trial is created with, received {state}"
        )


def repair_hint(path: Path) -> str:
    """How to go on with a damaged journal."""
    return f"`mergesearch repair {name_shown(str(path.parent), 200)}` says what can be kept"


def parse_line(line: bytes, where: str) -> Any:
    """A line as JSON.

    Raises:
        RunFolderError: If it is none.
    """
    return parse_json(decode(line, where, RunFolderError), where, RunFolderError)


def lines_from(path: Path, offset: int, *, torn: bool = False) -> Iterator[bytes]:
    """The whole lines of a file from an offset on.

    Args:
        path: The file.
        offset: Where to begin, in bytes.
        torn: Whether a last line without its end is told too.

    Raises:
        RunFolderError: If the file cannot be read, or a line is too long.
    """
    where = name_shown(str(path), 200)
    try:
        # A pipe in place of the file would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            stream.seek(offset)
            while (line := stream.readline(LINE_LIMIT)).endswith(b"\n"):
                yield line
            if torn and line:
                yield line
    except OSError as error:
        raise RunFolderError(
            f"{where}: expected a journal that can be read, received: {error.strerror or error}"
        ) from None
    if len(line) == LINE_LIMIT:
        raise RunFolderError(
            f"{where}: expected lines of at most {LINE_LIMIT} bytes, received more"
        )


class JournalReader:
    """Reads a journal as Optuna's file backend does, and checks every line once.

    Args:
        path: The file, which another process may append to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._check = LineCheck()
        self._offsets = [0]  # of the lines that are known, and of the next one

    def read_logs(self, first: int) -> Iterator[dict[str, Any]]:
        """Operations from the one with this number on.

        Raises:
            RunFolderError: If a line is damaged, with its number and how to go on.
        """
        number = min(first, len(self._offsets) - 1)
        for line in lines_from(self._path, self._offsets[number]):
            log = self._checked(number, line) if number >= len(self._offsets) - 1 else None
            if number >= first:
                yield parse_line(line, self._where(number)) if log is None else log
            number += 1

    def _checked(self, number: int, line: bytes) -> dict[str, Any]:
        where = self._where(number)
        try:
            log = parse_line(line, where)
            self._check.add(log, where)
        except RunFolderError as error:
            raise RunFolderError(f"{error}; {repair_hint(self._path)}") from None
        self._offsets.append(self._offsets[number] + len(line))
        return log  # type: ignore[no-any-return]

    def _where(self, number: int) -> str:
        return f"{name_shown(str(self._path), 200)}: line {number + 1}"


def naming_the_line(path: Path | None, read: Callable[[], Any]) -> Any:
    """What ``read`` returns; where it finds damage, the line of the journal is named.

    Args:
        path: The journal; None for a database.
        read: Reads what lines hold.

    Raises:
        RunFolderError: With file, line, and how to go on.
    """
    try:
        return read()
    except RunFolderError as error:
        if path is None:
            raise
        found = first_damage(path)
        told = str(error) if found is None else found
        raise RunFolderError(f"{told}; {repair_hint(path)}") from None


def first_damage(path: Path) -> str | None:
    """What is wrong with the first line that cannot be read back, or None; attributes too."""
    check = LineCheck(deep=True)
    for number, line in enumerate(lines_from(path, 0), start=1):
        where = f"{name_shown(str(path), 200)}: line {number}"
        try:
            check.add(parse_line(line, where), where)
        except RunFolderError as error:
            return str(error)
    return None
