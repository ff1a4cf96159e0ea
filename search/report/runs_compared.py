"""Several runs side by side: their winners on the test items, and what the studies differ in.

Winners are compared with that of the first run. All intervals of a comparison hold together in
95 %; they are paired item by item where both runs scored the same items in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mergesearch.evaluators import SPLITS, Objective, Split
from mergesearch.merging import InputError
from mergesearch.search.grammar import counted
from mergesearch.search.record.trial_record import Score, TrialSummary
from mergesearch.search.report.comparison import improvement_over
from mergesearch.search.report.data import ReportData, label
from mergesearch.search.report.simultaneous import (
    critical_value,
    deviation_of,
    interval_around,
)
from mergesearch.search.report.wording import change, interval, plus_minus
from mergesearch.search.spec.comparison import differences, scored_alike

#: Lines of text for keys that differ; the others are counted.
SHOWN_KEYS = 8


@dataclass(frozen=True)
class RunScores:
    """The winner of a run, or its best trial so far.

    Attributes:
        run: The run folder as the user typed it.
        trial: Number of the trial; None while none is complete.
        name: What to call it.
        finished: Whether it is the winner.
        trials: Number of trials of the run.
        split: Items that it was scored on last; None without a trial.
        values, errors: Objective -> value and standard error on them.
        differs_in: Keys of the study that are others than the first run's, as ``key: its -> ours``.
    """

    run: str
    trial: int | None
    name: str
    finished: bool
    trials: int
    split: Split | None
    values: dict[str, float]
    errors: dict[str, float]
    differs_in: tuple[str, ...]


@dataclass(frozen=True)
class RunDifference:
    """The winner of a run against that of the first run in one objective.

    Attributes:
        run: The run folder.
        objective: Name.
        improvement: How much better it is than the first run's; positive is better in either
            direction.
        low, high: Interval of the improvement; None where no standard error is known.
        paired: Whether the interval comes from item-by-item differences.
    """

    run: str
    objective: str
    improvement: float
    low: float | None
    high: float | None
    paired: bool


@dataclass(frozen=True)
class RunsCompared:
    """Runs side by side.

    Attributes:
        objectives: Those that all runs have, in the first one's order.
        runs: In the order given.
        differences: Of every other run from the first; none from one that was scored on other kinds
            of items.
        notes: What limits the comparison.
    """

    objectives: tuple[Objective, ...]
    runs: tuple[RunScores, ...]
    differences: tuple[RunDifference, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison, JSON-able."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The comparison as text."""
        return [*_table(self), "", *self.sentences(), *_key_lines(self)]

    def sentences(self) -> list[str]:
        """How the winners differ, and what limits the comparison."""
        return [*_difference_lines(self), *self.notes]


def compare_runs(runs: Sequence[ReportData]) -> RunsCompared:
    """Compare the winners of runs, or their best trials so far.

    Raises:
        InputError: If there are fewer than two runs, or they share no objective.
    """
    if len(runs) < 2:
        raise InputError(f"compare: expected two runs or more, received {len(runs)}")
    first = runs[0]
    shared = tuple(o for o in first.objectives if all(o in each.objectives for each in runs))
    if not shared:
        listed = "; ".join(f"{each.run}: {[o.name for o in each.objectives]}" for each in runs)
        raise InputError(f"compare: expected an objective that all runs have, received {listed}")
    others = [each for each in runs[1:] if _comparable(first, each)]
    found = _differences(first, others, shared)
    scores = tuple(_scores(first, each) for each in runs)
    return RunsCompared(shared, scores, found, _notes(first, runs[1:], shared))


def _scores(first: ReportData, data: ReportData) -> RunScores:
    split, score = _standing(data)
    record = data.leading
    return RunScores(
        run=data.run,
        trial=None if record is None else record.number,
        name="" if record is None else label(record),
        finished=data.winner is not None,
        trials=len(data.records),
        split=split,
        values={} if score is None else dict(score.values),
        errors={} if score is None else dict(score.errors),
        differs_in=tuple(differences(first.resolved, data.resolved)),
    )


def _standing(data: ReportData) -> tuple[Split | None, Score | None]:
    """The last items that the winner, or the best trial so far, was scored on, and its score."""
    leading: TrialSummary | None = data.leading
    for split in reversed(SPLITS):
        score = None if leading is None else data.score(leading, split)
        if score is not None:
            return split, score
    return None, None


def _comparable(first: ReportData, other: ReportData) -> bool:
    """Whether both were scored last on items of one split."""
    split = _standing(first)[0]
    return split is not None and split == _standing(other)[0]


def _same_evaluation(first: ReportData, other: ReportData) -> bool:
    """Whether both score the same items in the same way."""
    digest = first.fingerprint.get("evaluation settings")
    theirs = other.fingerprint.get("evaluation settings")
    return digest is not None and theirs is not None and scored_alike(digest, theirs)


def _differences(
    first: ReportData, others: Sequence[ReportData], objectives: Sequence[Objective]
) -> tuple[RunDifference, ...]:
    pairs = [(other, objective) for other in others for objective in objectives]
    deviations = [deviation_of(objective.name, *_pair(first, other)) for other, objective in pairs]
    width = critical_value([each for each in deviations if each is not None])
    found = []
    for (other, objective), deviation in zip(pairs, deviations, strict=True):
        theirs, ours = _pair(first, other)
        improvement = improvement_over(objective, ours, theirs)
        low, high = interval_around(improvement, deviation, width)
        found.append(
            RunDifference(
                run=other.run,
                objective=objective.name,
                improvement=improvement,
                low=low,
                high=high,
                paired=deviation is not None and deviation.paired,
            )
        )
    return tuple(found)


def _pair(first: ReportData, other: ReportData) -> tuple[Score, Score]:
    """Scores of both, without their items where these are not the same ones."""
    theirs = _standing(first)[1]
    ours = _standing(other)[1]
    assert theirs is not None
    assert ours is not None
    if _same_evaluation(first, other):
        return theirs, ours
    return replace(theirs, items={}, resampled={}), replace(ours, items={}, resampled={})


def _notes(
    first: ReportData, others: Sequence[ReportData], shared: Sequence[Objective]
) -> tuple[str, ...]:
    notes = []
    for other in others:
        if not _comparable(first, other):
            told = " and ".join(f"{each.run} on {_standing(each)[0]}" for each in (first, other))
            notes.append(f"Not compared, because scored on items of other splits: {told}.")
        elif not _same_evaluation(first, other):
            notes.append(
                f"{other.run} was evaluated under other settings than {first.run}: whether scores "
                "mean the same is for you to judge, and intervals are unpaired."
            )
    names = {objective.name for objective in shared}
    left = [
        objective.name
        for each in (first, *others)
        for objective in each.objectives
        if objective.name not in names
    ]
    if left:
        notes.append(f"Not in all runs: {', '.join(dict.fromkeys(left))}.")
    return tuple(notes)


def _table(compared: RunsCompared) -> list[str]:
    names = [objective.name for objective in compared.objectives]
    rows = [["run", "winner", "trials", "items", *names]]
    for run in compared.runs:
        trial = run.name if run.finished else f"{run.name} so far" if run.name else "none"
        values = [
            plus_minus(run.values[name], run.errors.get(name)) if run.values else ""
            for name in names
        ]
        rows.append([run.run, trial, str(run.trials), run.split or "", *values])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _difference_lines(compared: RunsCompared) -> list[str]:
    errors = {run.run: run.errors for run in compared.runs}
    first = compared.runs[0].run
    lines = []
    for each in compared.differences:
        error = errors[each.run].get(each.objective)
        than = "to" if each.improvement == 0 else "than"
        line = f"{each.run}: {each.objective} {change(each.improvement, error)} {than} {first}"
        if each.low is not None and each.high is not None:
            line += f", 95 % interval {interval(each.low, each.high, error)}"
            line += "" if each.paired else ", unpaired"
        lines.append(f"{line}.")
    return lines


def _key_lines(compared: RunsCompared) -> list[str]:
    lines = []
    for run in compared.runs[1:]:
        if not run.differs_in:
            lines += ["", f"{run.run} is the same study."]
            continue
        more = len(run.differs_in) - SHOWN_KEYS
        lines += ["", f"{run.run} differs in {counted(len(run.differs_in), 'key')}:"]
        lines += [f"  {key}" for key in run.differs_in[:SHOWN_KEYS]]
        lines += [f"  and {more} more"] if more > 0 else []
    return lines
