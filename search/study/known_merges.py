"""Merges that were measured before: a trial of one of them is given its measurement.

A strategy that converges, or has few merges to choose from, asks for some of them again. Where the
evaluator scores a merge the same each time (``Evaluator.deterministic``), a worker would only
repeat what the record holds. Such a trial is asked and told like any other and costs the budget a
trial, but neither items nor time; its record names the trial that was measured (``same_as``).

Not every earlier trial serves: it must have ended on the same items, without gradient steps, and
the rule that may stop the new one must not have stopped it. What still runs is measured twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergesearch.evaluators import Evaluator, Measurement
from mergesearch.merging import Recipe
from mergesearch.search.fidelity.rules import EarlyStopRule, would_pass
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.workers.messages import Outcome

#: Trials in a row that may be answered from the record; then one is measured, so that also a budget
#: without a number of trials ends.
MOST_IN_A_ROW = 20


class KnownMerges:
    """Finds the trial that has measured a merge.

    The record says everything that it knows, so that a resumed study answers the same trials.

    Args:
        evaluator: Of the study.
        records: The log's own list of trials, which grows as the study goes on.
    """

    def __init__(self, evaluator: Evaluator, records: Sequence[TrialRecord]) -> None:
        # Plug-ins that say nothing promise nothing.
        self._deterministic = bool(getattr(evaluator, "deterministic", False))
        self._records = records
        self._numbers: dict[str, int] = {}  # of the first trial that measured each merge
        self._running: dict[int, str] = {}  # trial without a result -> its merge
        self._read = False

    def find(
        self,
        recipe: Recipe,
        item_count: int | None = None,
        rule: Callable[[], EarlyStopRule | None] = lambda: None,
    ) -> int | None:
        """Number of the trial that has measured a merge; None where it is to be measured.

        Args:
            recipe: The merge.
            item_count: Items to evaluate it on, the first so many; None: all, 0: none.
            rule: Makes the rule that may stop it, by what is known now.
        """
        if not self._deterministic or item_count == 0 or _all_repeat(self._records):
            return None
        self._catch_up()
        number = self._numbers.get(_key(recipe, item_count))
        if number is None or not would_pass(rule(), self._records[number].rungs):
            return None
        return number

    def add(self, record: TrialRecord) -> None:
        """Remember a trial that has just been asked, while its recipe is at hand."""
        if self._read and record.same_as is None:
            self._running[record.number] = _key(record.recipe, record.item_count)

    def _catch_up(self) -> None:
        """Read what has ended since; at first all trials, whose recipes are made anew."""
        if not self._read:
            self._read = True
            for record in self._records:
                self.add(record)
        ended = [n for n in self._running if self._records[n].state != "running"]
        for number in ended:
            key = self._running.pop(number)
            if _serves(self._records[number]):
                self._numbers.setdefault(key, number)


def answer(
    record: TrialRecord, records: Sequence[TrialRecord], rule: EarlyStopRule | None = None
) -> Outcome | None:
    """The result of a trial whose merge was measured before; None where a worker measures it.

    Args:
        record: The running trial.
        records: Every trial.
        rule: The rule that might have stopped it, whose stages it is recorded to have passed.
    """
    if record.same_as is None or not _serves(records[record.same_as]):
        return None
    earlier = records[record.same_as]
    stages = () if rule is None else rule.stages
    return Outcome(
        task=str(record.number),
        measurement=Measurement(
            values=earlier.values,
            errors=earlier.errors,
            items=earlier.items,
            violations=earlier.violations,
        ),
        failure=None,
        rungs={stage: earlier.rungs[stage] for stage in stages if stage in earlier.rungs},
    )


def measured_trial(record: TrialRecord) -> int:
    """Number of the trial that measured a trial's merge: itself, or the one that it repeats."""
    return record.number if record.same_as is None else record.same_as


def _key(recipe: Recipe, item_count: int | None) -> str:
    """A merge and the items that it is evaluated on."""
    return recipe.digest if item_count is None else f"{recipe.digest} {item_count}"


def _serves(record: TrialRecord) -> bool:
    """Whether a trial's measurement stands for another of the same merge, on the same items."""
    return (
        record.state in ("complete", "partial")
        and record.stopped is None
        and record.kind != "taken"
        and not record.gradient_items
        and record.item_count != 0
        and not record.lost
    )


def _all_repeat(records: Sequence[TrialRecord]) -> bool:
    """Whether the last trials were all answered from the record."""
    last = records[-MOST_IN_A_ROW:]
    return len(last) == MOST_IN_A_ROW and all(record.same_as is not None for record in last)
