"""problem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergesearch.search.front import Normaliser, to_losses
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.study.early_stopping import told_losses


def study_normaliser(plan: Plan, records: Sequence[TrialRecord]) -> Normaliser:
    """The scale of the objectives: the anchors' range, or losses as they are where no anchor was
    measured.
    """
    anchors = [r for r in records if r.kind == "anchor" and r.state == "complete"]
    losses = [to_losses(record.values, plan.objectives) for record in anchors]
    if not losses:
        count = len(plan.objectives)
        return Normaliser(np.zeros(count), np.ones(count))
    return Normaliser.from_anchors(np.array(losses))


def study_problem(
    plan: Plan, records: Sequence[TrialRecord], normaliser: Normaliser, budget: int
) -> Problem:
    """What the strategy is told: the box, the anchors in it, and the best of them as the place to
    begin.
    """
    anchors = [
        anchor for record in records if (anchor := _known(plan, record, normaliser)) is not None
    ]
    start = plan.space.start if plan.begin is None else plan.begin
    if anchors and plan.begin is None:
        losses = np.array([anchor.losses for anchor in anchors])
        start = anchors[int(np.argmin(normaliser.scalarise(losses, plan.weights)))].point
    return plan.problem(normaliser, budget, start, tuple(anchors))


def _known(plan: Plan, record: TrialRecord, normaliser: Normaliser) -> TrialResult | None:
    """An anchor as a strategy sees it, or None for what the box does not hold."""
    if (
        record.kind != "anchor"
        or record.state != "complete"
        or record.recipe.basis_key != plan.template.basis_key
    ):
        return None
    point = plan.space.encode(record.recipe.field)
    if point is None or bool(np.any((point < plan.space.lower) | (point > plan.space.upper))):
        return None
    losses = told_losses(to_losses(record.values, plan.objectives), record.violations, normaliser)
    return TrialResult(None, point, losses, dict(record.items))
