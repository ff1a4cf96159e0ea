"""What a strategy is told: the problem, anchors as results, and losses that count bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective
from mergesearch.search.front import Normaliser, to_losses
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.strategies.base import Problem, TrialResult


def study_normaliser(plan: Plan, records: Sequence[TrialRecord]) -> Normaliser:
    """The scale of the objectives: the anchors' range, or none where no anchor was measured."""
    anchors = [r for r in records if r.kind == "anchor" and r.state == "complete"]
    losses = [to_losses(record.values, plan.objectives) for record in anchors]
    if not losses:
        count = len(plan.objectives)
        return Normaliser(np.zeros(count), np.ones(count))
    return Normaliser.from_anchors(np.array(losses))


def study_problem(
    plan: Plan, records: Sequence[TrialRecord], normaliser: Normaliser, budget: int
) -> Problem:
    """The problem that a strategy is told: the box, known merges in it, and where to begin.

    Known are the anchors, and trials of other runs whose scores the study takes over. It begins at
    the best of them, unless the study takes its start from another run.
    """
    anchors = [
        known
        for record in records
        if (known := _known_result(plan, record, normaliser)) is not None
    ]
    start = plan.space.start if plan.begin is None else plan.begin
    if anchors and plan.begin is None:
        losses = np.array([anchor.losses for anchor in anchors])
        start = anchors[int(np.argmin(normaliser.scalarise(losses, plan.weights)))].point
    return plan.problem(normaliser, budget, start, tuple(anchors))


def result_of_others(plan: Plan, record: TrialRecord, normaliser: Normaliser) -> TrialResult | None:
    """A finished attempt at a failed trial as the strategy is told it: as a result of others.

    None where there is nothing to tell: it failed again, or the space does not hold the merge.
    """
    if record.state == "failed":
        return None
    if record.kind == "anchor":
        return _anchor_result(plan, record, normaliser)
    return trial_result(plan, record, normaliser)


def trial_result(plan: Plan, record: TrialRecord, normaliser: Normaliser) -> TrialResult:
    """A finished search trial as its strategy is told it."""
    assert record.point is not None
    values = record.estimates or record.values
    losses = None
    if values:
        losses = to_losses(values, plan.objectives)
        losses = penalised_losses(losses, record.violations, normaliser)
    errors = record.errors if record.stopped is None else record.estimate_errors or record.errors
    return TrialResult(
        id=record.suggestion,
        point=record.point,
        losses=losses,
        items={} if record.stopped is not None else dict(record.items),
        evaluated=record.item_count,
        gradient_result=record.gradient_result,
        estimated=record.stopped,
        errors=None if losses is None else loss_errors(errors, plan.objectives),
    )


def loss_errors(
    errors: Mapping[str, float], objectives: Sequence[Objective]
) -> npt.NDArray[np.float64] | None:
    """Standard errors of losses ``(objectives,)``, NaN where unknown; None where none is known."""
    known = np.array([errors.get(objective.name, np.nan) for objective in objectives])
    return known if np.isfinite(known).any() else None


def penalised_losses(
    losses: npt.NDArray[np.float64], violations: Mapping[str, float], normaliser: Normaliser
) -> npt.NDArray[np.float64]:
    """Losses ``(objectives,)`` of a trial, worse than the worst anchor's where it misses a bound.

    The more it misses, the worse they are (Deb 2000, "An efficient constraint handling method for
    genetic algorithms": any trial that keeps the bounds is better than any that does not, and of
    those the one that misses less is better).
    """
    missed = sum(max(value, 0.0) for value in violations.values())
    if not missed:
        return losses
    low = normaliser.low
    high = normaliser.high
    return np.asarray(np.maximum(losses, high) + (high - low) * missed)


def _known_result(plan: Plan, record: TrialRecord, normaliser: Normaliser) -> TrialResult | None:
    """A result from before the search as a strategy is told it; None where it is told nothing."""
    if record.kind == "taken":
        return trial_result(plan, record, normaliser) if record.state == "complete" else None
    return _anchor_result(plan, record, normaliser)


def _anchor_result(plan: Plan, record: TrialRecord, normaliser: Normaliser) -> TrialResult | None:
    """An anchor as a strategy is told it; None where the space does not hold it."""
    if record.kind != "anchor" or record.state != "complete":
        return None
    point = plan.point_of(record.recipe)
    if point is None:
        return None
    losses = to_losses(record.values, plan.objectives)
    losses = penalised_losses(losses, record.violations, normaliser)
    errors = loss_errors(record.errors, plan.objectives)
    return TrialResult(None, point, losses, dict(record.items), errors=errors)
