"""Repairs the journal of a run, or says what a repair would do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.evaluators.spec.evaluators import build_evaluator
from mergesearch.merging import RunFolderError
from mergesearch.merging.checkpoints.atomic import sync, write_atomically
from mergesearch.search.grammar import counted
from mergesearch.search.record.journal_lines import (
    CREATE_STUDY,
    CREATE_TRIAL,
    LineCheck,
    lines_from,
    parse_line,
)
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.report.saved import FILE
from mergesearch.search.runs.repair.facts import facts
from mergesearch.search.runs.repair.lines import Damage, Line, read_lines
from mergesearch.search.runs.repair.salvage import REPAIRED, Salvage, repaired_line, salvage

#: Operations that create a study or a trial.
CREATING = (CREATE_STUDY, CREATE_TRIAL)
#: Damaged lines that are told one by one.
SHOWN = 20


@dataclass(frozen=True)
class Repair:
    """What a repair does, or has done.

    Attributes:
        run: The run's folder.
        lines: Number of lines of the damaged journal.
        salvage: What becomes of it.
        original: Where the damaged journal is kept; None where nothing needs a repair.
        done: Whether it was written.
    """

    run: Path
    lines: int
    salvage: Salvage
    original: Path | None
    done: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        made = self.salvage
        return {
            "run": str(self.run),
            "repaired": self.done,
            "needed": self.original is not None,
            "lines": self.lines,
            "damaged": [{"line": each.number, "reason": each.reason} for each in made.damages],
            "kept": made.kept,
            "measured_again": list(made.again),
            "asked_again": list(made.asked),
            "lost": list(made.gone),
            "final_choice_again": made.reopened,
            "notes": list(made.notes),
            "original": None if self.original is None else str(self.original),
        }

    def text(self) -> list[str]:
        """What is printed for people."""
        made = self.salvage
        if self.original is None:
            return [f"{self.run}: nothing to repair, {counted(made.kept, 'trial')} kept"]
        told = [each.reason for each in made.damages[:SHOWN]]
        more = len(made.damages) - SHOWN
        told += [f"and {more} more"] if more > 0 else []
        head = f"{counted(self.lines, 'line')}, {counted(len(made.damages), 'damaged line')}"
        told = [head, *told, *made.consequences]
        if self.done:
            return [*told, f"repaired; the journal as it was is kept as {self.original.name}"]
        step = (
            f"nothing is written yet: `mergesearch repair {self.run} --yes` keeps the journal as "
            f"it is as {self.original.name}, and writes the repaired one"
        )
        return [*told, step]


def repair(path: Path, *, write: bool) -> Repair:
    """Repair the journal of a run, or say what that would do.

    Args:
        path: The run's folder.
        write: Whether it is done; else nothing is written.

    Raises:
        RunFolderError: If there is no run, its trials are in a database, a driver is at work, or
            the folder cannot be written.
    """
    folder = RunFolder(path)
    spec = folder.load()
    if spec.storage is not None:
        raise RunFolderError(
            f"{path}: expected a run with a journal, received one whose trials are in a database; "
            "restore the database from its backup"
        )
    if not folder.journal.is_file():
        raise RunFolderError(
            f"{folder.journal}: expected the journal of a run, found none; see `mergesearch run`"
        )
    with ExitStack() as stack:
        if write:
            stack.callback(folder.release)
            folder.hold()
        elif (driver := folder.driver()) is not None:
            raise RunFolderError(
                f"{path}: expected no driver while a journal is repaired, found {driver}; wait for "
                "it, or stop it first"
            )
        found = read_lines(folder.journal)
        evaluator = build_evaluator(spec.evaluators, Path())
        made = salvage(found, spec.name, evaluator.objectives)
        lines = max((each.number for each in found), default=0)
        needed = bool(made.damages or made.loses) or not _stands(folder.journal, found, made)
        original = _free_name(folder.journal) if needed else None
        if write and original is not None:
            earlier = facts([each for each in found if isinstance(each, Line)]).get(REPAIRED)
            _write(folder, made, original, earlier or ())
    return Repair(path, lines, made, original, write and original is not None)


def _stands(journal: Path, found: Sequence[Line | Damage], made: Salvage) -> bool:
    """Whether every line of a journal can be read back, in its order, and none stands twice."""
    begun = [each.log for each in found if isinstance(each, Line) and each.code in CREATING]
    if begun != [log for log in made.lines if log["op_code"] in CREATING]:
        return False
    check = LineCheck(deep=True)
    try:
        for line in lines_from(journal, 0, torn=True):
            if not line.endswith(b"\n"):  # readers pass it over
                return False
            check.add(parse_line(line, "line"), "line")
    except RunFolderError:
        return False
    return True


def _write(folder: RunFolder, made: Salvage, original: Path, earlier: Sequence[str]) -> None:
    """Keep the journal under another name, and put the repaired one in its place at once."""
    told = "; ".join(made.consequences)
    text = f"the journal was repaired ({counted(len(made.damages), 'damaged line')}): {told}"
    logs = [*made.lines, repaired_line(earlier, text)]
    content = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
    try:
        _keep(folder.journal, original)
        if made.loses and (folder.path / FILE).is_file():
            # It would say more than the journal does.
            os.replace(folder.path / FILE, _free_name(folder.path / FILE))
        write_atomically(folder.journal, content)
        sync(folder.path)
    except OSError as error:
        raise RunFolderError(
            f"{folder.path}: expected a folder that can be written, received: "
            f"{error.strerror or error}; free space, or mend its permissions"
        ) from None


def _keep(journal: Path, original: Path) -> None:
    """Give the journal a second name; where the file system has no links, a copy."""
    try:
        os.link(journal, original)
    except OSError:
        shutil.copy2(journal, original)
        sync(original)
    sync(journal.parent)


def _free_name(file: Path) -> Path:
    """The first ``NAME.original-N`` that is not taken."""
    number = 1
    while os.path.lexists(file.with_name(f"{file.name}.original-{number}")):
        number += 1
    return file.with_name(f"{file.name}.original-{number}")
