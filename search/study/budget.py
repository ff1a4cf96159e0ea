"""What a study may spend, and what it has spent: trials, evaluations of items, seconds, hours of
workers.

Trials and evaluations are counted when a trial is asked, failures in full, so that no study ever
exceeds them; what a trial that was stopped early has left is given back. Time is known when a trial
ends: a study stops asking once it is spent, and finishes what is in flight. Re-evaluations on
validation and test items are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.spec.sections import BudgetSection

#: Suggestions that a strategy is told to expect when the budget is a time and nothing is known of
#: the trials yet.
UNKNOWN = 1000


@dataclass(frozen=True)
class Spent:
    """What trials have cost.

    Attributes:
        trials: Asked, whatever became of them.
        evaluations: Items that they were asked to be evaluated on, or to take gradients on.
        seconds: Wall time in which at least one ran; breaks between sessions do not count.
        worker_hours: Time of all workers on finished trials, in hours.
    """

    trials: int
    evaluations: int
    seconds: float
    worker_hours: float


def spent(records: Sequence[TrialRecord], cost: Callable[[int | None], int]) -> Spent:
    """What the trials of a log have cost.

    Args:
        records: Every trial.
        cost: Evaluations of a trial on so many items (None: all).
    """
    return Spent(
        trials=len(records),
        evaluations=sum(cost(record.evaluated) + record.gradient_items for record in records),
        seconds=busy_seconds(records),
        worker_hours=sum(sum(record.seconds.values()) for record in records) / 3600,
    )


def busy_seconds(records: Iterable[TrialRecord]) -> float:
    """Seconds in which at least one trial ran: the union of their spans; breaks between sessions do
    not count.
    """
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
        cost: Evaluations of a trial on so many items (None: all); constant during a study.
        reserve: Whole trials kept back for what follows the search.
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
        self._counted = before.trials
        self._seconds = before.seconds
        self._started = clock()
        self._worker_seconds = 3600 * before.worker_hours

    def cost(self, item_count: int | None) -> int:
        """Evaluations of a trial on ``item_count`` items (None: all)."""
        if item_count not in self._costs:
            self._costs[item_count] = self._cost(item_count)
        return self._costs[item_count]

    def release(self) -> None:
        """Spend what was kept back on the search after all."""
        self._reserve = 0

    def note_end(self, record: TrialRecord) -> None:
        """A trial has ended."""
        self._worker_seconds += sum(record.seconds.values())
        if record.stopped is not None and record.number < self._counted:
            self._evaluations -= self.cost(record.item_count) - self.cost(record.stopped)

    def allows(self, item_count: int | None = 1, gradient_items: int = 0) -> bool:
        """Whether a trial on ``item_count`` items, and ``gradient_items`` for gradients, may be
        asked; by default whether any trial may.
        """
        for record in self._records[self._counted :]:
            self._evaluations += self.cost(record.evaluated) + record.gradient_items
        self._counted = len(self._records)
        section = self._section
        kept = self._reserve
        evaluations = (
            self._evaluations + self.cost(item_count) + gradient_items + kept * self.cost(None)
        )
        return (
            (section.trials is None or self._counted + 1 + kept <= section.trials)
            and (section.evaluations is None or evaluations <= section.evaluations)
            and (
                section.seconds is None
                or self._seconds + self._clock() - self._started < section.seconds
            )
            and (section.worker_hours is None or self._worker_seconds < 3600 * section.worker_hours)
        )

    def expected(self, slots: int) -> int:
        """Suggestions that the time will allow, as far as can be told from the anchors; at least 1.

        Args:
            slots: Trials that run at a time.
        """
        ended = [
            sum(r.seconds.values()) for r in self._records if r.kind == "anchor" and r.finished
        ]
        each = sum(ended) / len(ended) if ended else 0.0
        if not each:
            return UNKNOWN
        seconds = self._section.seconds
        hours = self._section.worker_hours
        limits = [] if seconds is None else [slots * seconds / each]
        limits += [] if hours is None else [3600 * hours / each]
        return max(int(min(limits)), 1)
