"""What a study costs: bytes and seconds of a trial, trials per hour, time and bill of a budget."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.search.plan.cards import cards_here
from mergesearch.search.plan.plan import Plan
from mergesearch.search.runs.cost.trial_cost import Cost, bytes_of_trial, measure_cost

#: Seconds that the timed evaluation takes for ``mergesearch check --cost``, about.
PROBE = 2.0
HOUR = 3600.0


@dataclass(frozen=True)
class StudyCost:
    """What a planned study costs on this machine.

    Attributes:
        trial: Of one trial.
        read: Bytes that a merge reads: the base and all rows.
        written: Bytes that it writes: the merged model.
        at_a_time: Trials that run at a time.
        trials: In all, anchors and recommendation included.
        seconds: Of the whole study, with its preparation and its held-out items.
        rented: Cards that it occupies; without cards, its workers.
        price: Of one of these for an hour; None where the study names none.
    """

    trial: Cost
    read: int
    written: int
    at_a_time: int
    trials: int
    seconds: float
    rented: int
    price: float | None

    @property
    def per_hour(self) -> float:
        """Trials in an hour."""
        return HOUR * self.at_a_time / self.trial.trial

    @property
    def merging_ahead(self) -> float:
        """The largest share of a trial that merging the next model during evaluations would save.

        It needs a second copy of the merged weights, and saves all of it only where the two compete
        for nothing: neither cores nor memory bandwidth.
        """
        return min(self.trial.merge, self.trial.evaluate) / self.trial.trial

    @property
    def bill(self) -> float | None:
        """Price of the whole study, in the unit of ``price``."""
        if self.price is None:
            return None
        return self.price * self.rented * self.seconds / HOUR

    def to_dict(self) -> dict[str, Any]:
        """The cost as JSON."""
        return {
            "trial": self.trial.to_dict(),
            "bytes_read": self.read,
            "bytes_written": self.written,
            "at_a_time": self.at_a_time,
            "trials_per_hour": self.per_hour,
            "merging_ahead": self.merging_ahead,
            "trials": self.trials,
            "seconds": self.seconds,
            "rented": self.rented,
            "price_per_hour": self.price,
            "bill": self.bill,
        }


def study_cost(plan: Plan, folder: Path) -> StudyCost | str:
    """Time a trial of a planned study for about two seconds, or say why that is not done.

    Args:
        plan: The study.
        folder: Where prepared weights may lie for a while.

    Raises:
        InputError: If the base cannot be evaluated.
    """
    trial = measure_cost(plan, folder, PROBE)
    return trial if isinstance(trial, str) else cost_of_study(plan, trial)


def cost_of_study(plan: Plan, trial: Cost) -> StudyCost:
    """What a study costs whose trials cost so much each."""
    read, written = bytes_of_trial(plan)
    workers = workers_of(plan)
    trials = _trials(plan, trial)
    cards = plan.spec.workers.gpus_each
    return StudyCost(
        trial=trial,
        read=read,
        written=written,
        at_a_time=trials_at_a_time(plan),
        trials=trials,
        seconds=seconds_of_study(plan, trial, trials),
        rented=max(round(workers * cards), 1) if cards else workers,
        price=plan.spec.workers.price_per_hour,
    )


def workers_of(plan: Plan) -> int:
    """Workers of a study: as many as it names, else as fit on this machine."""
    workers = plan.spec.workers
    if not workers.distributed:
        return 1
    if workers.count is not None:
        return workers.count
    if workers.gpus_each:
        return max(int(len(cards_here()) / workers.gpus_each), 1)
    return max(int((os.cpu_count() or 1) / workers.cpus), 1)


def trials_at_a_time(plan: Plan) -> int:
    """Trials that make progress at a time: those of workers that share no core."""
    workers = plan.spec.workers
    count = workers_of(plan)
    if workers.gpus_each or workers.address is not None:
        return count
    return max(min(count, (os.cpu_count() or 1) // workers.threads), 1)


def seconds_of_study(plan: Plan, trial: Cost, trials: int) -> float:
    """Seconds of a study of so many trials, from its preparation to its held-out scores."""
    work = trials * trial.trial + held_out(plan, trial)
    return trial.prepare + work / trials_at_a_time(plan)


def held_out(plan: Plan, trial: Cost) -> float:
    """Seconds of work that anchors and leaders take on validation and test items."""
    if not trial.items:
        return 0.0
    search = max(plan.evaluator.size("search"), 1)
    more = plan.evaluator.size("validation") + plan.evaluator.size("test")
    count = len(plan.anchors) + plan.spec.selection.leaders
    each = trial.evaluate * search / trial.items
    return float(count * each * more / search)


def _trials(plan: Plan, trial: Cost) -> int:
    """Trials that the budget allows, where a time limits them as well as where it does not."""
    budget = plan.spec.budget
    others = len(plan.anchors) + plan.recommended_trials
    at_a_time = trials_at_a_time(plan)
    limits = [] if plan.search_trials is None else [plan.search_trials + others]
    if budget.seconds is not None:
        limits.append(int(budget.seconds * at_a_time / trial.trial))
    if budget.worker_hours is not None:
        limits.append(int(HOUR * budget.worker_hours / trial.trial))
    return max(min(limits), others + 1)
