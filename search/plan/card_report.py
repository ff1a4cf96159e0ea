"""The plan of a study's cards in words: what lies where, which encoding and why, and refusals."""

from __future__ import annotations

from mergesearch.merging import InputError
from mergesearch.merging.resident.card_memory import FACTORS
from mergesearch.search.grammar import counted
from mergesearch.search.plan.batch_memory import ROW_TOKENS
from mergesearch.search.plan.card_needs import CardBytes
from mergesearch.search.plan.card_plan import CardPlan
from mergesearch.search.plan.cards import smallest_that_fits


def plan_lines(plan: CardPlan) -> list[str]:
    """The plan for people, a line for each subject."""
    workers = plan.settings.per_gpu
    spread = f"{counted(workers, 'worker')} on each"
    if plan.settings.gpus > 1:
        spread = f"each worker on {plan.settings.gpus}"
    most = plan.most_workers
    room = f", {most} would fit" if most > workers else ""
    where = ", base and rows in main memory" if plan.settings.on_host else ""
    usable = gigabytes(plan.card.usable)
    disk = gigabytes(plan.node.disk)
    host = gigabytes(plan.node.host)
    # Elements that tie with the least one that is kept are kept too, how many only weights tell.
    bound = "about, more where changes tie" if "packed" in plan.weights.by_encoding else "at most"
    return [
        f"cards       {plan.count} x {plan.card.name}, {usable} usable, {spread}{room}{where}",
        f"rows        {why(plan)}",
        f"card        {gigabytes(plan.peak)} {bound}: {breakdown(plan.fullest)}",
        f"batch       {_batch(plan)}",
        f"node        {disk} on disk, {host} of main memory",
    ]


def why(plan: CardPlan) -> str:
    """Which encoding rows are kept in, and why."""
    sizes = plan.weights.by_encoding
    exact = "exact" if plan.weights.is_exact else "approximate"
    setting = plan.settings.rows
    if FACTORS in sizes:
        reason = "every expert is an adapter of the base"
    elif setting != "auto":
        reason = f"the study says rows: {setting}"
    else:
        reason = f"the smallest exact form of {plan.demand.operator.name}"
        if "packed" in sizes:
            reason += f", of which rows keep {_density(plan):.0%}"
    return f"{' and '.join(sizes) or 'none'}, {exact}: {reason}"


def _density(plan: CardPlan) -> float:
    """The share of elements that packed rows keep, as the study's hyperparameters say."""
    return plan.demand.operator.density(plan.demand.options)


def refusal(plan: CardPlan) -> InputError:
    """Why a plan does not fit, and what to set instead."""
    advice = plan.advice()
    larger = smallest_that_fits(plan.peak)
    hint = "take more cards, or larger ones" + ("" if larger is None else f" ({larger})")
    if advice:
        hint = f"set {' or '.join(advice)}"
    return InputError(
        f"memory: expected at most {gigabytes(plan.card.usable)} on each of "
        f"{counted(plan.count, 'card')} ({plan.card.name}), received {gigabytes(plan.peak)} "
        f"({breakdown(plan.fullest)}; {_batch(plan)}); {hint}"
    )


def gigabytes(size: int) -> str:
    """Bytes in GB (10^9), or in MB where these are few."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def breakdown(card: CardBytes) -> str:
    """What lies on a card, part by part."""
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in vars(card).items() if size)


def _batch(plan: CardPlan) -> str:
    batch = plan.batch
    if not batch.rows:
        return "batches are the engine's" if batch.engine else "batches are not estimated"
    assumed = " as assumed for texts" if batch.tokens == ROW_TOKENS else ""
    return f"{counted(batch.rows, 'row')} of {batch.tokens:,} tokens{assumed}"
