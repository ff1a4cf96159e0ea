"""The leading trial against the best anchor, objective by objective, and what it trades."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import SPLITS, Objective, Split
from mergesearch.search.front import signs
from mergesearch.search.record.trial_record import Score, TrialSummary
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.simultaneous import deviation_of
from mergesearch.search.study.reference_scores import Z95

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """The winner against the best anchor in one objective.

    Attributes:
        objective: Name.
        split: Items that both were measured on.
        winner, anchor: Value of each.
        winner_error, anchor_error: Standard errors, None where unknown.
        improvement: How much better the winner is, in the objective's unit; positive is better in
            either direction.
        low, high: 95 % interval of the improvement over this anchor alone, None where no standard
            error is known. :mod:`mergesearch.search.report.gains` has those that hold for all
            anchors at once.
        paired: Whether the interval comes from differences on the same items, or resamples of them;
            otherwise it is the wider one of two independent samples.
        optimism: How much better the winner looked on the search items than on the test items, None
            before the test.
    """

    objective: str
    split: Split
    winner: float
    winner_error: float | None
    anchor: float
    anchor_error: float | None
    improvement: float
    low: float | None
    high: float | None
    paired: bool
    optimism: float | None


def compare(data: ReportData) -> list[Comparison]:
    """The leading trial against the best anchor, per objective; empty when either is missing."""
    leading = data.leading
    anchor = data.best_anchor
    split = compared_on(data)
    if leading is None or anchor is None or split is None:
        return []
    ours = data.score(leading, split)
    theirs = data.score(anchor, split)
    assert ours is not None
    assert theirs is not None
    return [_comparison(data, objective, split, ours, theirs) for objective in data.objectives]


def compared_on(data: ReportData) -> Split | None:
    """The last split that leading trial and best anchor were both measured on."""
    contenders = [record for record in (data.leading, data.best_anchor) if record is not None]
    if len(contenders) < 2:
        return None
    for split in reversed(SPLITS):
        if all(data.score(record, split) is not None for record in contenders):
            return split
    return None


def _comparison(
    data: ReportData, objective: Objective, split: Split, winner: Score, anchor: Score
) -> Comparison:
    name = objective.name
    improvement = improvement_over(objective, winner, anchor)
    error, paired = _difference_error(_paired_items(data, split, name), winner, anchor, name)
    return Comparison(
        objective=name,
        split=split,
        winner=winner.values[name],
        winner_error=winner.errors.get(name),
        anchor=anchor.values[name],
        anchor_error=anchor.errors.get(name),
        improvement=improvement,
        low=None if error is None else improvement - Z95 * error,
        high=None if error is None else improvement + Z95 * error,
        paired=paired,
        optimism=_optimism(data, objective),
    )


def _optimism(data: ReportData, objective: Objective) -> float | None:
    """How much better the leading trial looked on the search items than on the test items."""
    test = data.score(data.leading, "test") if data.leading is not None else None
    if test is None or data.leading is None:
        return None
    name = objective.name
    return float(-signs([objective])[0] * (data.leading.values[name] - test.values[name]))


def _paired_items(data: ReportData, split: Split, name: str) -> Array | None:
    """Scores of the leading trial less the best anchor's, ``(items,)``; None where unknown."""
    ours, theirs = (
        data.items.get(record.number, {}).get(name)
        for record in (data.leading, data.best_anchor)
        if record is not None
    )
    if split != "test" or ours is None or theirs is None:
        return None
    return ours - theirs if len(ours) == len(theirs) > 1 else None


def _difference_error(
    items: Array | None, winner: Score, anchor: Score, name: str
) -> tuple[float | None, bool]:
    """Standard error of winner less anchor, and whether it is paired."""
    difference = winner.values[name] - anchor.values[name]
    size = max(abs(winner.values[name]), 1.0)
    # Differences of items explain a value only where it is their mean. (Logs keep items in single
    # precision.)
    if items is not None and math.isclose(items.mean(), difference, abs_tol=1e-5 * size):
        return float(items.std(ddof=1) / math.sqrt(len(items))), True
    deviation = deviation_of(name, winner, anchor)
    return (None, False) if deviation is None else (deviation.error, deviation.paired)


@dataclass(frozen=True)
class Alternative:
    """A trial that loses to the best anchor in no objective.

    Attributes:
        trial: Its number.
        improvements: Split -> objective -> how much better it is than the best anchor, for every
            split that it was measured on.
    """

    trial: int
    improvements: Mapping[Split, Mapping[str, float]]


@dataclass(frozen=True)
class TradeOff:
    """The leading trial is better than the best anchor in one objective and worse in another.

    Attributes:
        split: Items that both were measured on last.
        improvements: Objective -> how much better the leading trial is there; negative is worse.
        decided_on: Items that the winner, and so the alternative, is chosen on.
        alternative: The best trial that loses in no objective on the items that decide, possibly
            the leading one itself; None if every trial loses in some objective.
    """

    split: Split
    improvements: Mapping[str, float]
    decided_on: Split
    alternative: Alternative | None


def trade_off(data: ReportData) -> TradeOff | None:
    """What the leading trial trades against the best anchor; None where it trades nothing."""
    comparisons = compare(data)
    improvements = {c.objective: c.improvement for c in comparisons}
    if not any(v > 0 for v in improvements.values()):
        return None
    if not any(v < 0 for v in improvements.values()):
        return None
    decided_on = _decided_on(data)
    return TradeOff(comparisons[0].split, improvements, decided_on, _alternative(data, decided_on))


def _decided_on(data: ReportData) -> Split:
    """The items that choose the winner; the search items while nothing else was measured."""
    contenders = [record for record in (data.leading, data.best_anchor) if record is not None]
    scored = all(data.score(record, "validation") is not None for record in contenders)
    return "validation" if scored else "search"


def _alternative(data: ReportData, split: Split) -> Alternative | None:
    """The best leader or front member that loses to the best anchor in no objective."""
    candidates: list[tuple[float, int]] = []
    for record in _candidates(data):
        score = data.score(record, split)
        if score is None or not score.feasible:
            continue
        if min(_improvements(data, record, split).values()) >= 0:
            candidates.append((data.complete.scalarise(score), record.number))
    if not candidates:
        return None
    _, number = min(candidates)
    measured = {each: _improvements(data, data.by_number[number], each) for each in SPLITS}
    return Alternative(number, {each: values for each, values in measured.items() if values})


def _candidates(data: ReportData) -> list[TrialSummary]:
    """Leaders and front members that are no anchors."""
    leaders = () if data.verdict is None else data.verdict.leaders
    numbers = sorted({*leaders, *(record.number for record in data.front)})
    records = [data.by_number[number] for number in numbers]
    return [record for record in records if record.kind != "anchor"]


def _improvements(data: ReportData, record: TrialSummary, split: Split) -> dict[str, float]:
    """Objective -> how much better a trial is than the best anchor; empty where not measured."""
    assert data.best_anchor is not None
    ours = data.score(record, split)
    theirs = data.score(data.best_anchor, split)
    if ours is None or theirs is None:
        return {}
    return {o.name: improvement_over(o, ours, theirs) for o in data.objectives}


def improvement_over(objective: Objective, ours: Score, theirs: Score) -> float:
    """How much better ``ours`` is; 0 where values differ by the rounding of a sum alone."""
    value = ours.values[objective.name]
    other = theirs.values[objective.name]
    if math.isclose(value, other, rel_tol=1e-12):
        return 0.0
    return float(-signs([objective])[0]) * (value - other)
