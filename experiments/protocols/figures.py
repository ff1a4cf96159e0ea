"""What protocols report, worked out from the scores of merges, base and experts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, float]


def goodness(value: float, name: str, rates: Collection[str]) -> float:
    """A score of which more is better: the value, or 1 − value of a rate that is minimised."""
    return 1 - value if name in rates else value


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Standard deviation over subsets; NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True)
class Judge:
    """How objectives become scores of tasks.

    Attributes:
        tasks: Task of every expert -> its objectives.
        held_out: Task without an expert -> its objectives.
        general: Objectives of what the base can do.
        rates: Minimised objectives that count as 1 − value.
        minimised: All minimised objectives.
        base: Values of the base.
        experts: Expert -> its values.
    """

    tasks: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]
    general: Sequence[str]
    rates: Collection[str]
    minimised: Collection[str]
    base: Values
    experts: Mapping[str, Values]

    def score(self, values: Values, task: str) -> float:
        """Mean over a task's objectives."""
        names = self.tasks.get(task) or self.held_out[task]
        return mean([goodness(values[name], name, self.rates) for name in names])

    def normalised(self, values: Values, tasks: Sequence[str]) -> float:
        """Mean over tasks of the score over that of the task's expert."""
        return mean(
            [
                ratio(self.score(values, task), self.score(self.experts[task], task))
                for task in tasks
            ]
        )

    def over_base(self, values: Values, tasks: Sequence[str]) -> float:
        """Mean over tasks of the score over the base's."""
        return mean(
            [ratio(self.score(values, task), self.score(self.base, task)) for task in tasks]
        )

    def general_change(self, values: Values) -> float:
        """Mean change of the general objectives, as shares of the base's; below 0 is forgetting."""
        changes = []
        for name in self.general:
            sign = -1.0 if name in self.minimised else 1.0
            changes.append(sign * ratio(values[name] - self.base[name], abs(self.base[name])))
        return mean(changes)

    def outside(self, experts: Collection[str]) -> list[str]:
        """Tasks held out from a merge: those without an expert, else those of other experts."""
        return list(self.held_out) or [task for task in self.tasks if task not in experts]


def ratio(value: float, reference: float) -> float:
    """Value over reference; NaN where the reference is 0."""
    return value / reference if reference else math.nan


@dataclass(frozen=True)
class Row:
    """What is reported of one method, and of one number of experts where subsets are merged.

    Attributes:
        label: The method, or ``base`` and the like.
        experts: How many were merged; None for references.
        merges: Over how many subsets figures are means.
        scores: Task -> score; empty where tasks differ between subsets.
        average: Mean over tasks.
        normalised: Mean of score over the expert's, and its deviation over subsets.
        held_out: Mean of score over the base's on tasks held out, and its deviation.
        general: Change of what the base can do.
        coefficient: Of the merge, or a range.
        seconds: ``prepare``, ``choose`` and ``score`` of one merge by the clock, and those of the
            ``processor`` for all three; means over merges.
        memory, card: Bytes at most.
    """

    label: str
    experts: int | None
    merges: int
    scores: Mapping[str, float]
    average: float
    normalised: tuple[float, float]
    held_out: tuple[float, float]
    general: float
    coefficient: str = ""
    seconds: Mapping[str, float] | None = None
    memory: int | None = None
    card: int | None = None


def reference_row(judge: Judge, label: str, values: Values) -> Row:
    """The row of a model that was not merged."""
    scores = {task: judge.score(values, task) for task in judge.tasks}
    outside = judge.outside(judge.tasks)
    return Row(
        label,
        None,
        1,
        scores,
        mean(list(scores.values())),
        (judge.normalised(values, list(judge.tasks)), math.nan),
        (judge.over_base(values, outside), math.nan),
        judge.general_change(values),
    )


def experts_row(judge: Judge) -> Row:
    """The row of every expert on its own task."""
    scores = {task: judge.score(judge.experts[task], task) for task in judge.tasks}
    general = mean([judge.general_change(values) for values in judge.experts.values()])
    outside = [
        judge.over_base(values, judge.outside([name])) for name, values in judge.experts.items()
    ]
    average = mean(list(scores.values()))
    return Row(
        "each expert at home",
        None,
        len(scores),
        scores,
        average,
        (1.0, math.nan),
        (mean(outside), spread(outside)),
        general,
    )


def method_row(judge: Judge, cells: Sequence[Mapping[str, Any]]) -> Row:
    """The row of a method from its merges of as many experts."""
    tasks = [list(cell["experts"]) for cell in cells]
    inside = [judge.normalised(cell["values"], own) for cell, own in zip(cells, tasks, strict=True)]
    outside = [
        judge.over_base(cell["values"], judge.outside(own))
        for cell, own in zip(cells, tasks, strict=True)
    ]
    alone = len(cells) == 1
    scores = {task: judge.score(cells[0]["values"], task) for task in tasks[0]} if alone else {}
    averages = [
        mean([judge.score(cell["values"], task) for task in own])
        for cell, own in zip(cells, tasks, strict=True)
    ]
    cards = [cell["peak"]["card"] for cell in cells if cell["peak"]["card"] is not None]
    return Row(
        str(cells[0]["method"]),
        len(tasks[0]),
        len(cells),
        scores,
        mean(averages),
        (mean(inside), spread(inside)),
        (mean(outside), spread(outside)),
        mean([judge.general_change(cell["values"]) for cell in cells]),
        _coefficients([cell["coefficient"] for cell in cells]),
        {part: mean([cell["seconds"][part] for cell in cells]) for part in cells[0]["seconds"]},
        max(cell["peak"]["memory"] for cell in cells),
        max(cards, default=None),
    )


def _coefficients(values: Sequence[float | None]) -> str:
    known = sorted({value for value in values if value is not None})
    if not known:
        return "adapted"
    ends = [f"{value:.3g}" for value in (known[0], known[-1])]
    return ends[0] if len(known) == 1 else " to ".join(ends)
