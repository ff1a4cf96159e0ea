"""What a study costs, for people: the lines of ``mergesearch check``."""

from __future__ import annotations

from pathlib import Path

from mergesearch.merging import InputError
from mergesearch.search.grammar import counted
from mergesearch.search.plan.card_check import check_cards_there
from mergesearch.search.plan.plan import Plan
from mergesearch.search.report.page.cost_section import duration
from mergesearch.search.runs.cost.study_cost import StudyCost, study_cost
from mergesearch.search.runs.cost.trial_cost import bytes_of_trial
from mergesearch.search.runs.listed import size_text


def timed_cost(plan: Plan, card: str | None) -> StudyCost | str:
    """What a study costs on this machine, or why that is not known.

    Raises:
        InputError: If it is planned for another machine, or the base cannot be evaluated.
    """
    if card is not None:
        raise InputError("--cost: expected a study for this machine; leave out --card")
    check_cards_there(plan)
    return study_cost(plan, Path.cwd())


def cost_lines(plan: Plan, cost: StudyCost | str | None) -> list[str]:
    """What a trial moves, and with --cost what it and the study take."""
    read, written = bytes_of_trial(plan)
    moved = f"reads {size_text(read)} and writes {size_text(written)}"
    if cost is None:
        return [f"cost        a merge {moved}; --cost times a trial"] if read else []
    if isinstance(cost, str):
        return [f"cost        not timed: {cost}"]
    trial = cost.trial
    timed = f", {trial.timed:,} of {trial.items:,} items timed" if trial.timed < trial.items else ""
    merge = f"merge {trial.merge:.3g} s ({moved}), " if read else ""
    what = counted(cost.rented, "GPU" if plan.spec.workers.gpus_each else "worker")
    bill = f"; {cost.bill:.2f} for {what} at {cost.price:g} an hour each" if cost.bill else ""
    workers = "" if cost.at_a_time == 1 else f", {cost.at_a_time} at a time"
    each = f"{merge}evaluate {trial.evaluate:.3g} s{timed}"
    trials = f"{counted(cost.trials, 'trial')} with preparation and held-out items"
    ahead = f"merging ahead during evaluations could save {cost.merging_ahead:.1%} at most"
    return [
        f"cost        {each}: {cost.per_hour:,.0f} trials an hour{workers}",
        f"            {trials} take about {duration(cost.seconds)}{bill}",
        *([f"            {ahead}; trials do not overlap"] if read else []),
    ]
