"""The winner against every anchor at once: intervals that hold together, and what they establish.

A gain is claimed only where the winner is better than every anchor by more than its simultaneous
interval (:mod:`mergesearch.search.report.simultaneous`), on test items, which had no say in the
choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergesearch.evaluators import Objective
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.comparison import improvement_over
from mergesearch.search.report.data import ReportData, label
from mergesearch.search.report.simultaneous import (
    Deviation,
    critical_value,
    deviation_of,
    interval_around,
)


@dataclass(frozen=True)
class AnchorInterval:
    """The winner against one anchor in one objective.

    Attributes:
        objective: Name of the objective.
        trial: Number of the anchor.
        anchor: Its name.
        improvement: How much better the winner is on test items, in the objective's unit; positive
            is better in either direction.
        error: Standard error of the improvement, None where unknown.
        low, high: Interval of the improvement; all intervals of a report hold together in 95 %.
            None where no standard error is known.
        kept: Whether the anchor keeps all bounds on the items that decide.
        paired: Whether the error comes from differences on the same items, or resamples of them.
    """

    objective: str
    trial: int
    anchor: str
    improvement: float
    error: float | None
    low: float | None
    high: float | None
    paired: bool
    kept: bool = True

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``tie`` for the winner; ``unknown`` without an interval."""
        if self.low is None or self.high is None:
            return "unknown"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "tie"


@dataclass(frozen=True)
class Gain:
    """What the winner gains in one objective over the best of all anchors, whichever that is.

    Attributes:
        objective: Name of the objective.
        claimed: Whether the winner is better than every anchor by more than its interval.
        improvement: The smallest improvement over any anchor.
        anchor: The anchor that it is over.
        low, high: Simultaneous interval of the improvement over the best anchor.
        anchors: Number of anchors that the winner was compared with: those that keep the bounds,
            or all where none does.
        left_out: Number of anchors that miss a bound, with which it was not compared.
        ties: Anchors that the winner cannot be told from.
        worse_than: Anchors that are better than the winner by more than their interval.
    """

    objective: str
    claimed: bool
    improvement: float
    anchor: str
    low: float
    high: float
    anchors: int
    ties: tuple[str, ...]
    worse_than: tuple[str, ...]
    left_out: int = 0


def anchor_intervals(data: ReportData) -> list[AnchorInterval]:
    """The winner against every anchor in every objective, best anchors first.

    Empty before the test, and where nothing but the winner was measured.
    """
    if data.winner is None or data.verdict is None:
        return []
    scores = data.verdict.scores.get("test", {})
    ours = scores.get(data.winner.number)
    anchors = [each.number for each in data.anchors if each.number in scores]
    rivals = [number for number in anchors if number != data.winner.number]
    if ours is None or not rivals:
        return []
    pairs = [(objective, number) for objective in data.objectives for number in rivals]
    deviations = [deviation_of(objective.name, ours, scores[number]) for objective, number in pairs]
    width = critical_value([each for each in deviations if each is not None])
    intervals = [
        _interval(
            data.by_number[number],
            objective,
            improvement_over(objective, ours, scores[number]),
            deviation,
            width,
            data.anchor_scores[number].feasible if number in data.anchor_scores else True,
        )
        for (objective, number), deviation in zip(pairs, deviations, strict=True)
    ]
    order = {objective.name: place for place, objective in enumerate(data.objectives)}
    return sorted(intervals, key=lambda each: (order[each.objective], each.improvement))


def gains(data: ReportData, intervals: Sequence[AnchorInterval]) -> list[Gain]:
    """What the winner gains, by objective; empty where an anchor won or nothing is known.

    Objectives without standard errors are left out: there is no noise to tell a gain from.

    Args:
        data: The study.
        intervals: Its :func:`anchor_intervals`.
    """
    if data.winner is None or data.winner.kind == "anchor":
        return []
    by_objective = [
        [each for each in intervals if each.objective == objective.name]
        for objective in data.objectives
    ]
    return [gain for group in by_objective if (gain := _gain(group)) is not None]


def _gain(intervals: Sequence[AnchorInterval]) -> Gain | None:
    every = len(intervals)
    intervals = [each for each in intervals if each.kept] or intervals
    lows = [each.low for each in intervals if each.low is not None]
    highs = [each.high for each in intervals if each.high is not None]
    if not intervals or len(lows) < len(intervals):
        return None
    least = min(intervals, key=lambda each: each.improvement)
    return Gain(
        objective=least.objective,
        claimed=min(lows) > 0,
        left_out=every - len(intervals),
        improvement=least.improvement,
        anchor=least.anchor,
        low=min(lows),
        high=min(highs),
        anchors=len(intervals),
        ties=tuple(each.anchor for each in intervals if each.verdict == "tie"),
        worse_than=tuple(each.anchor for each in intervals if each.verdict == "worse"),
    )


def _interval(
    record: TrialSummary,
    objective: Objective,
    improvement: float,
    deviation: Deviation | None,
    width: float,
    kept: bool,
) -> AnchorInterval:
    """The interval of an improvement, ``width`` standard errors to either side."""
    low, high = interval_around(improvement, deviation, width)
    return AnchorInterval(
        objective=objective.name,
        trial=record.number,
        anchor=label(record),
        improvement=improvement,
        error=None if deviation is None else deviation.error,
        low=low,
        high=high,
        paired=deviation is not None and deviation.paired,
        kept=kept,
    )
