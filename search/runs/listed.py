"""Runs below a folder, each in a line: how it stands, its winner, its size and its age."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergesearch.merging import MergesearchError
from mergesearch.search.grammar import counted
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.report.saved import saved_data

#: Units of a size and of an age, largest first.
BYTES = ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "kB"))
SECONDS = ((86_400, "day"), (3_600, "hour"), (60, "minute"))


@dataclass(frozen=True)
class RunRow:
    """A run in a line.

    Attributes:
        name: Its folder as the user would type it.
        state: ``running`` while a driver holds it, ``finished`` with a winner, else ``stopped``;
            ``unreadable`` where the record cannot be read.
        trials: Number of its trials; None where it is not known.
        winner: Number of the winning trial, or None.
        bytes: Size of the folder.
        changed: When anything in it last changed, seconds since 1970.
        reason: Why it cannot be read; empty where it can.
    """

    name: str
    state: str
    trials: int | None
    winner: int | None
    bytes: int
    changed: float
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row with its line as ``summary``, JSON-able."""
        return asdict(self) | {"summary": self.line(time.time())}

    def line(self, now: float) -> str:
        """The row as text without its name, at a time in seconds since 1970."""
        state = f"cannot be read: {self.reason}" if self.reason else self.state
        won = [] if self.winner is None else [f"winner: trial {self.winner}"]
        trials = [] if self.trials is None else [counted(self.trials, "trial")]
        return ", ".join([state, *trials, *won, size_text(self.bytes), _age(now - self.changed)])


def list_runs(root: Path) -> Iterator[RunRow]:
    """The runs of a folder, by name. None needs the inputs of its study."""
    for path in sorted(root.glob("*/study.yaml")):
        yield _row(path.parent)


def _row(path: Path) -> RunRow:
    size, changed = _measured(path)
    try:
        trials, winner = _standing(path)
    except MergesearchError as error:
        return RunRow(str(path), "unreadable", None, None, size, changed, str(error))
    if RunFolder(path).driver() is not None:
        state = "running"
    else:
        state = "stopped" if winner is None else "finished"
    return RunRow(str(path), state, trials, winner, size, changed)


def _standing(path: Path) -> tuple[int, int | None]:
    """Number of trials and the winner, or None."""
    saved = saved_data(path)
    if saved is not None:
        return len(saved.records), None if saved.verdict is None else saved.verdict.winner
    # Optuna costs more to import than everything else here.
    from mergesearch.search.record.storage import read_storage
    from mergesearch.search.record.study_attributes import study_attr, study_id_of
    from mergesearch.search.runs.wiring import recorded_location

    folder = RunFolder(path)
    study = folder.recorded()
    storage = read_storage(recorded_location(study, folder))
    verdict = study_attr(storage, study["name"], "verdict")
    trials = storage.get_n_trials(study_id_of(storage, study["name"]))
    return trials, None if verdict is None else verdict["winner"]


def _measured(path: Path) -> tuple[int, float]:
    """Bytes in a folder, and when anything in it last changed."""
    size = 0
    changed = path.stat().st_mtime
    for file in path.rglob("*"):
        try:
            status = file.stat()
        except OSError:  # a temporary file that has just got its name, or a link to nothing
            continue
        size += status.st_size if stat.S_ISREG(status.st_mode) else 0
        changed = max(changed, status.st_mtime)
    return size, changed


def size_text(size: int) -> str:
    """A number of bytes in the largest unit that suits."""
    for unit, name in BYTES:
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"


def _age(seconds: float) -> str:
    for unit, name in SECONDS:
        if seconds >= unit:
            return f"{counted(int(seconds // unit), name)} ago"
    return "just now"
