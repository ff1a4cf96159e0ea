"""Checks a study against the cards of this machine, before weights are read."""

from __future__ import annotations

from dataclasses import replace

from mergesearch.merging import InputError
from mergesearch.search.grammar import counted
from mergesearch.search.plan.card_needs import demand_of, settings_of
from mergesearch.search.plan.card_plan import CardPlan, plan_cards
from mergesearch.search.plan.card_report import refusal
from mergesearch.search.plan.cards import PlannedCard, cards_here
from mergesearch.search.plan.plan import Plan


def plan_for(plan: Plan, card: PlannedCard, count: int) -> CardPlan | None:
    """The cards of a planned study; None for problems without a model.

    Raises:
        InputError: If a worker has more cards than there are.
    """
    demand = demand_of(plan)
    return None if demand is None else plan_cards(demand, settings_of(plan, count), card, count)


def plan_for_this_machine(plan: Plan) -> CardPlan | None:
    """The cards of a study that asks for those of this machine; None where there is nothing to say.

    A machine with too few cards is refused where workers are placed. Cards of several sizes are
    planned as the smallest.
    """
    workers = plan.spec.workers
    if not workers.gpus_each or workers.address is not None:
        return None
    cards = cards_here()
    if settings_of(plan).gpus > len(cards):
        return None
    return plan_for(plan, min(cards, key=lambda card: card.total), len(cards))


def check_cards_there(plan: Plan) -> None:
    """Refuse a study whose workers need more cards than this machine has, if they are to run here.

    Raises:
        InputError: In one line.
    """
    workers = plan.spec.workers
    if not workers.gpus_each or workers.address is not None:
        return
    asked = settings_of(plan).gpus
    there = len(cards_here())
    if there < asked:
        key = "gpus" if workers.per_gpu is None else "per_gpu"
        raise InputError(
            f"workers.{key}: expected {counted(asked, 'GPU')} here, found {there or 'none'} that "
            "torch can use; check with --card for a machine elsewhere, name the cluster in "
            "workers.address, or set workers.gpus: 0"
        )


def plan_without_limit(plan: Plan) -> CardPlan | None:
    """What a study needs on each card, whichever that is; None for problems without a model."""
    return plan_for(plan, PlannedCard("any card", 1 << 60), settings_of(plan).gpus)


def check_cards(plan: Plan) -> list[str]:
    """Refuse a study that this machine's cards cannot hold.

    Batches are halved where memory runs out, so that one that is too large is no reason.

    Returns:
        Warnings, one line each.

    Raises:
        InputError: If not even batches of one row fit.
    """
    planned = plan_for_this_machine(plan)
    if planned is None:
        return []
    if planned.fits:
        host = ["memory: base and rows stay in main memory, where trials are merged"]
        return host if planned.settings.on_host else []
    if not _fits_with_least_batch(planned):
        raise refusal(planned)
    return [str(refusal(planned))]


def _fits_with_least_batch(planned: CardPlan) -> bool:
    """Whether a plan fits with batches of one row."""
    least = replace(planned.settings, divisor=planned.demand.largest_batch)
    return plan_cards(planned.demand, least, planned.card, planned.count).fits
