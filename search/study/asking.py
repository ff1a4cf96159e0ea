"""Asking: a trial is recorded as running before any work is done for it."""

from __future__ import annotations

from mergesearch.merging import Recipe
from mergesearch.search.plan.anchors import Anchor
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.strategies.base import Point, Suggestion
from mergesearch.search.study.known_merges import KnownMerges


def ask_anchor(plan: Plan, log: TrialLog, anchor: Anchor) -> TrialRecord:
    """Record an anchor as a running trial."""
    return log.ask(
        "anchor",
        anchor.recipe,
        name=anchor.name,
        summary=_anchor_summary(plan, anchor.recipe),
        bounds=_bounds(plan),
    )


def ask_taken(plan: Plan, log: TrialLog, name: str, point: Point) -> TrialRecord:
    """Record a trial of another run as a running trial, whose result is known."""
    return log.ask(
        "taken",
        plan.space.decode(point),
        name=name,
        point=point,
        decode=plan.space.decode,
        summary=plan.space.summary(point),
        bounds=_bounds(plan),
    )


def ask_again(plan: Plan, log: TrialLog, failed: TrialRecord) -> TrialRecord:
    """Record another attempt at a failed trial as a running trial, without gradient steps."""
    point = failed.point
    return log.ask(
        failed.kind,
        failed.recipe,
        name=failed.name,
        point=point,
        item_count=failed.item_count,
        retry_of=failed.number,
        summary=_anchor_summary(plan, failed.recipe)
        if point is None
        else plan.space.summary(point),
        bounds=_bounds(plan),
    )


def ask_recommended(plan: Plan, log: TrialLog, point: Point, known: KnownMerges) -> TrialRecord:
    """Record the strategy's recommendation as a running trial."""
    recipe = plan.space.decode(point)
    return log.ask(
        "recommended",
        recipe,
        point=point,
        decode=plan.space.decode,
        same_as=known.find(recipe),
        summary=plan.space.summary(point),
        bounds=_bounds(plan),
    )


def ask_suggested(
    plan: Plan,
    log: TrialLog,
    suggestion: Suggestion,
    recipe: Recipe,
    tells: int,
    all_items: int,
    same_as: int | None = None,
) -> TrialRecord:
    """Record a suggestion of the strategy as a running trial.

    Args:
        plan: The study.
        log: Its trial log.
        suggestion: What the strategy asked for.
        recipe: The merge that its point stands for.
        tells: How many results the strategy has been told.
        all_items: Number of search items.
        same_as: The trial whose measurement it is given; None where it is measured.
    """
    return log.ask(
        "search",
        recipe,
        point=suggestion.point,
        decode=plan.space.decode,
        suggestion=suggestion.id,
        tells_at_ask=tells,
        item_count=item_count_of(suggestion, all_items),
        gradient_items=gradient_items_of(plan, suggestion),
        same_as=same_as,
        notes=suggestion.notes,
        summary=plan.space.summary(suggestion.point),
        bounds=_bounds(plan),
    )


def item_count_of(suggestion: Suggestion, all_items: int) -> int | None:
    """Number of items to evaluate a suggestion on; None for all."""
    items = suggestion.items
    return None if items is None or items >= all_items else items


def gradient_items_of(plan: Plan, suggestion: Suggestion) -> int:
    """Number of items that a suggestion's gradient steps read."""
    steps = suggestion.gradient_steps
    if steps is None:
        return 0
    return steps.batches * plan.evaluator.batch_cost(steps.config.batch, list(steps.config.weights))


def _anchor_summary(plan: Plan, recipe: Recipe) -> dict[str, float]:
    """The numbers that dashboards plot, for recipes of the study's own operator."""
    own = recipe.basis_key == plan.template.basis_key
    return dict(plan.space.summary_of(recipe.field)) if own else {}


def _bounds(plan: Plan) -> tuple[float, float]:
    return float(plan.space.lower.min()), float(plan.space.upper.max())
