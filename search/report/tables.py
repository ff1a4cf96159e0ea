"""The result table: every anchor and the winner, by objective and split, for every output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergesearch.evaluators import SPLITS, Objective, Split
from mergesearch.merging.foreign.shown import printable
from mergesearch.search.record.trial_record import Score, TrialSummary
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.wording import plus_minus

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "–"
ARROWS = {"maximize": "↑", "minimize": "↓"}


@dataclass(frozen=True)
class Row:
    """One line of the result table.

    Attributes:
        trial: Trial number.
        name: Anchor's name, ``search`` or ``recommended``.
        state: ``running``, ``complete`` or ``failed``.
        scores: Split -> values and standard errors, for the splits that were measured.
        best_anchor: Whether it is the best anchor (on validation items once they are measured).
        winner: Whether it won.
        leading: Whether it is the best so far of a study that has no winner yet.
        same_as: The earlier trial of the same merge that was measured instead, if there is one.
    """

    trial: int
    name: str
    state: str
    scores: Mapping[Split, Score]
    best_anchor: bool = False
    winner: bool = False
    leading: bool = False
    same_as: int | None = None

    @property
    def marks(self) -> str:
        """Why the line stands out, in words."""
        marks = {
            "winner": self.winner,
            "best so far": self.leading,
            "best anchor": self.best_anchor,
        }
        failed = {"failed": self.state == "failed", "running": self.state == "running"}
        listed = [mark for mark, holds in {**marks, **failed}.items() if holds]
        same = [] if self.same_as is None else [f"same merge as trial {self.same_as}"]
        return ", ".join([*listed, *same, *self._misses()])

    def _misses(self) -> list[str]:
        """``misses harm at most base on test items``; no items where it does on all."""
        by_bound: dict[str, list[str]] = {}
        for split, score in self.scores.items():
            for name in score.missed:
                by_bound.setdefault(name, []).append(split)
        return [
            f"misses {name}" + (f" on {', '.join(on)} items" if len(on) < len(self.scores) else "")
            for name, on in by_bound.items()
        ]


def result_table(data: ReportData) -> list[Row]:
    """Every anchor by number, then the winner (or the best trial so far) unless it is an anchor."""
    records = list(data.anchors)
    if data.leading is not None and data.leading not in records:
        records.append(data.leading)
    return [_row(data, record) for record in records]


def _row(data: ReportData, record: TrialSummary) -> Row:
    scores = {split: score for split in SPLITS if (score := data.score(record, split)) is not None}
    return Row(
        trial=record.number,
        name=record.name or record.kind,
        state=record.state,
        scores=scores,
        best_anchor=record is data.best_anchor,
        winner=record is data.winner,
        leading=data.winner is None and record is data.leading,
        same_as=record.same_as,
    )


def cell(row: Row, split: Split, objective: Objective) -> str:
    """Value and standard error of one objective on one split."""
    score = row.scores.get(split)
    if score is None or objective.name not in score.values:
        return MISSING
    return plus_minus(score.values[objective.name], score.errors.get(objective.name))


def heading(objective: Objective) -> str:
    """Objective's name with an arrow that points to better."""
    return f"{objective.name} {ARROWS[objective.direction]}"


def rich_table(data: ReportData) -> Table:
    """The result table for a terminal; one line per objective inside each row."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(data.study)), title_justify="left", box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    table.add_column("", overflow="fold")
    table.add_column("objective", style="dim")
    for split in SPLITS:
        table.add_column(split, justify="right")
    table.add_column("")
    for row in result_table(data):
        style = "bold" if row.winner or row.leading else "red" if row.state == "failed" else None
        cells = [str(row.trial), row.name, "\n".join(heading(o) for o in data.objectives)]
        cells += ["\n".join(cell(row, split, o) for o in data.objectives) for split in SPLITS]
        # Text, not str: a name in square brackets is not markup.
        texts = (printable(text, keep="\n") for text in [*cells, row.marks])
        table.add_row(*(Text(text) for text in texts), style=style)
    return table


def text_lines(data: ReportData) -> list[str]:
    """The result table as plain aligned lines, header first."""
    lines = [["trial", "", "objective", *SPLITS, ""]]
    for row in result_table(data):
        for index, objective in enumerate(data.objectives):
            first = [str(row.trial), row.name] if index == 0 else ["", ""]
            figures = [cell(row, split, objective) for split in SPLITS]
            lines.append([*first, heading(objective), *figures, row.marks if index == 0 else ""])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    right = {0, 3, 4, 5}
    return ["  ".join(_aligned(line, widths, right)).rstrip() for line in lines]


def _aligned(line: list[str], widths: list[int], right: set[int]) -> list[str]:
    pairs = enumerate(zip(line, widths, strict=True))
    return [text.rjust(width) if i in right else text.ljust(width) for i, (text, width) in pairs]
