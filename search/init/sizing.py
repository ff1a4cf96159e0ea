"""How large a study is: trials by time, coefficients by trials, the operator by both."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mergesearch.merging import InputError, Layout
from mergesearch.search.grammar import counted
from mergesearch.search.plan.plan import Plan
from mergesearch.search.runs.cost.study_cost import (
    held_out,
    seconds_of_study,
    trials_at_a_time,
)
from mergesearch.search.runs.cost.trial_cost import Cost
from mergesearch.spaces.groups import Granularity, group_tensors

#: Trials where nothing was timed.
UNTIMED = 100
#: Trials beyond which a small study hardly gains; with many coefficients, so many for each.
ENOUGH = 300
ENOUGH_EACH = 10
#: Trials that a search should have at least; where time allows fewer, it sees fewer items.
FEWEST = 100
#: Search items that are kept in any case.
FEWEST_ITEMS = 100
#: Search trials beside anchors and recommendation in any case.
LEAST_SEARCH = 10
#: Time of a trial with gradient steps, of which strategies take some in few trials, on average.
WITH_GRADIENTS = 1.5
GRADIENT_STRATEGIES = ("hybrid",)
#: Granularities from fine to coarse, and trials for each coefficient that they need.
FINE_TO_COARSE: tuple[Granularity, ...] = ("block", "module", "task")
TRIALS_EACH = 2
#: Trials from which it pays to measure operators first.
TRIALS_FOR_AUTO = 150


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Attributes:
        trials: In all.
        why: Why so many.
        granularity: Of its coefficients.
        dimensions: Number of coefficients at that granularity.
        seconds: Expected time of the study; None where nothing was timed.
        max_items: Search items, where not all are used.
    """

    trials: int
    why: str
    granularity: Granularity
    dimensions: int
    seconds: float | None
    max_items: int | None = None


def size_of(plan: Plan, cost: Cost | None, minutes: float) -> Size:
    """The size of a study that takes some minutes.

    Args:
        plan: A draft of the study.
        cost: Of a trial; None where it was not timed.
        minutes: What the user allows.
    """
    assert plan.layout is not None
    experts = len(plan.template.experts)
    least = len(plan.anchors) + plan.recommended_trials + LEAST_SEARCH
    if cost is None:
        granularity, dimensions = _granularity(plan.layout, experts, UNTIMED)
        why = "Nothing was timed: a first look. More refine the result, and can be added later."
        return Size(max(UNTIMED, least), why, granularity, dimensions, None)
    if plan.strategy.name in GRADIENT_STRATEGIES:
        cost = replace(cost, evaluate=WITH_GRADIENTS * cost.evaluate)
    max_items = _fewer_items(plan, cost, minutes)
    if max_items is not None:
        cost = cost.with_items(max_items)
    affordable = max(_affordable(plan, cost, minutes), least)
    granularity, dimensions = _granularity(plan.layout, experts, affordable)
    enough = max(ENOUGH, ENOUGH_EACH * dimensions)
    trials = _rounded(min(affordable, enough), least)
    seconds = seconds_of_study(plan, cost, trials)
    about = f"About {cost.trial:.2g} s a trial on this machine"
    if affordable > enough:
        why = f"{about}: {trials} trials take about {_minutes(seconds)}; more would gain little."
    elif affordable == least:
        why = f"{about}: the fewest trials of a search take about {_minutes(seconds)}."
    else:
        why = f"{about}: {trials} trials take about {_minutes(seconds)}."
    return Size(trials, why, granularity, dimensions, seconds, max_items)


def _granularity(layout: Layout, experts: int, trials: int) -> tuple[Granularity, int]:
    """The finest granularity that a number of trials can serve, and its coefficients."""
    for granularity in FINE_TO_COARSE[:-1]:
        try:
            dimensions = experts * len(group_tensors(layout, granularity))
        except InputError:
            continue  # no numbered blocks
        if TRIALS_EACH * dimensions <= trials:
            return granularity, dimensions
    return FINE_TO_COARSE[-1], experts


def _fewer_items(plan: Plan, cost: Cost, minutes: float) -> int | None:
    """Search items with which the time holds enough trials; None for all of them."""
    affordable = _affordable(plan, cost, minutes)
    if affordable >= FEWEST or cost.items <= FEWEST_ITEMS:
        return None
    return max(FEWEST_ITEMS, cost.items * max(affordable, 1) // FEWEST)


def _affordable(plan: Plan, cost: Cost, minutes: float) -> int:
    left = (60 * minutes - cost.prepare) * trials_at_a_time(plan) - held_out(plan, cost)
    return int(max(left, 0.0) / cost.trial)


def _rounded(trials: int, least: int) -> int:
    """Two digits of a number, at least the least."""
    step = int(10 ** max(len(str(trials)) - 2, 0))
    return max(trials // step * step, least)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return counted(round(seconds / 60), "minute")
