"""The budget of a study: trials, evaluations of items, seconds, and hours of workers.

Trials and evaluations are counted when a trial is asked, failures in full, so that no study ever
exceeds them; evaluations that a stopped trial did not need are given back. A gradient of an item
counts as three evaluations: one pass forward, and twice its cost back. Time is known when a
trial ends: a study stops asking once it is spent, and running trials finish. Re-evaluations on
validation and test items are not counted, and another attempt at a failed trial is one of neither
trials nor evaluations: these were counted when it was first asked. Nor is a trial whose scores
another run has measured. A trial whose merge was measured before counts as a trial alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.spec.sections import BudgetSection
from mergesearch.search.workers.gradient_steps import GRADIENT_COST

#: Number of suggestions that a strategy expects when the budget is a time and no trial has been
#: timed yet.
UNKNOWN = 1000


@dataclass(frozen=True)
class Spent:
    """The cost of trials.

    Attributes:
        trials: Number of trials, finished or not.
        evaluations: Number of items that they are evaluated on, and three times that of gradients.
        seconds: Wall time in which at least one ran; breaks between sessions do not count.
        worker_hours: Time of all workers on finished trials, in hours.
    """

    trials: int
    evaluations: int
    seconds: float
    worker_hours: float


def spent(records: Sequence[TrialRecord], cost: Callable[[int | None], int]) -> Spent:
    """The cost of the trials of a log.

    Args:
        records: Every trial.
        cost: Number of items (None: all) -> evaluations of a trial on them.
    """
    first = [record for record in records if record.charged]
    return Spent(
        trials=len(first),
        evaluations=sum(_cost(record, cost) for record in first),
        seconds=busy_seconds(records),
        worker_hours=sum(sum(record.seconds.values()) for record in records) / 3600,
    )


def _cost(record: TrialRecord, cost: Callable[[int | None], int]) -> int:
    """Evaluations of a trial and of its gradients; none where the record answered it."""
    if record.same_as is not None:
        return 0
    return cost(record.evaluated) + GRADIENT_COST * record.gradient_items


def busy_seconds(records: Iterable[TrialRecord]) -> float:
    """Seconds in which at least one trial ran; breaks between sessions do not count."""
    spans = sorted(
        (r.finished - sum(r.seconds.values()), r.finished) for r in records if r.finished
    )
    total = 0.0
    reached = float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


class BudgetTracker:
    """The budget of a running study.

    Args:
        section: What may be spent.
        records: The log's own list of trials, which grows as the study goes on.
        cost: Number of items (None: all) -> evaluations of a trial on them; constant during a
            study.
        reserve: Number of whole trials kept back for the recommendation after the search.
        clock: Seconds that only ever grow.
    """

    def __init__(
        self,
        section: BudgetSection,
        records: Sequence[TrialRecord],
        cost: Callable[[int | None], int],
        reserve: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._section = section
        self._records = records
        self._reserve = reserve
        self._clock = clock
        self._costs: dict[int | None, int] = {}
        self._cost = cost
        before = spent(records, self.cost)
        self._evaluations = before.evaluations
        self._trials = before.trials
        self._seen = len(records)
        self._seconds = before.seconds
        self._started = clock()
        self._worker_seconds = 3600 * before.worker_hours

    def cost(self, item_count: int | None) -> int:
        """Evaluations of a trial on ``item_count`` items (None: all)."""
        if item_count not in self._costs:
            self._costs[item_count] = self._cost(item_count)
        return self._costs[item_count]

    def release(self) -> None:
        """Give the reserve to the search."""
        self._reserve = 0

    def add_finished(self, record: TrialRecord) -> None:
        """Count the time of a finished trial, and give back evaluations that it did not need."""
        self._worker_seconds += sum(record.seconds.values())
        counted = record.charged and record.number < self._seen
        if record.stopped is not None and counted:
            self._evaluations -= self.cost(record.item_count) - self.cost(record.stopped)

    def allows(self, item_count: int | None = 1, gradient_items: int = 0) -> bool:
        """Whether one more trial may be asked.

        Args:
            item_count: Items that it is evaluated on (None: all); by default the smallest trial.
            gradient_items: Items that its gradient steps read.
        """
        section = self._section
        return (
            self.has_room(item_count, gradient_items)
            and (
                section.seconds is None
                or self._seconds + self._clock() - self._started < section.seconds
            )
            and (section.worker_hours is None or self._worker_seconds < 3600 * section.worker_hours)
        )

    def has_room(self, item_count: int | None = 1, gradient_items: int = 0) -> bool:
        """Whether one more trial fits into trials and evaluations; arguments as above."""
        for record in self._records[self._seen :]:
            if record.charged:
                self._trials += 1
                self._evaluations += _cost(record, self.cost)
        self._seen = len(self._records)
        section = self._section
        reserve = self._reserve
        asked = self.cost(item_count) + GRADIENT_COST * gradient_items
        evaluations = self._evaluations + asked + reserve * self.cost(None)
        return (section.trials is None or self._trials + 1 + reserve <= section.trials) and (
            section.evaluations is None or evaluations <= section.evaluations
        )

    def expected(self, slots: int) -> int:
        """Number of suggestions that the time allows, by the time of the anchors; at least 1.

        Args:
            slots: Number of trials that run at a time.
        """
        durations = [
            sum(r.seconds.values()) for r in self._records if r.kind == "anchor" and r.finished
        ]
        mean = sum(durations) / len(durations) if durations else 0.0
        if not mean:
            return UNKNOWN
        seconds = self._section.seconds
        hours = self._section.worker_hours
        limits = [] if seconds is None else [slots * seconds / mean]
        limits += [] if hours is None else [3600 * hours / mean]
        return max(int(min(limits)), 1)
