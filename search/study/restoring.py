"""Restores what a repaired journal lacks, while the record is replayed.

A replay asks a lost trial again, and measures a lost result again at the place where the strategy
was told it. Both are what they were, so that the study goes on as if nothing had been lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergesearch.merging import ReplayError
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.strategies.base import Suggestion
from mergesearch.search.study.asking import gradient_items_of, item_count_of
from mergesearch.search.study.budget import BudgetTracker
from mergesearch.search.study.context import StudyContext
from mergesearch.search.study.early_stopping import EarlyStopping
from mergesearch.search.study.events import Event
from mergesearch.search.study.measuring import Measurer
from mergesearch.search.workers.gradient_steps import GradientSteps
from mergesearch.search.workers.messages import Outcome, Task


class Restorer:
    """Asks lost trials and measures lost results again.

    Args:
        context: The study.
        measurer: Knows the references that tasks need.
        early_stopping: Which rule may stop a trial.
        budget: What may still be spent.
    """

    def __init__(
        self,
        context: StudyContext,
        measurer: Measurer,
        early_stopping: EarlyStopping,
        budget: BudgetTracker,
    ) -> None:
        self._context = context
        self._measurer = measurer
        self._early_stopping = early_stopping
        self._budget = budget

    def ask(self, record: TrialRecord, suggestions: Sequence[Suggestion]) -> TrialRecord:
        """Record a lost trial again, as the strategy asks it in the replay.

        Raises:
            ReplayError: If the strategy asks for nothing, or for another suggestion.
        """
        if len(suggestions) != 1 or suggestions[0].id != record.suggestion:
            raise ReplayError(
                f"trial {record.number}: expected suggestion {record.suggestion} in place of the "
                "lost one, the strategy asks for another; start another --run"
            )
        suggestion = suggestions[0]
        plan = self._context.plan
        asked = replace(
            record,
            point=suggestion.point,
            merge=plan.space.decode(suggestion.point),
            item_count=item_count_of(suggestion, self._early_stopping.items),
            gradient_items=gradient_items_of(plan, suggestion),
            lost=False,
        )
        return self._context.log.restore(record.number, asked)

    def measure(self, number: int, steps: GradientSteps | None) -> TrialRecord:
        """Measure a trial whose result was lost, and record it where it was told.

        Args:
            number: The trial's number.
            steps: Its gradient steps.
        """
        context = self._context
        waiting = [self._task(context.log.records[number], steps)]
        context.notify(Event("phase", f"measuring trial {number} again, whose result was lost"))

        def next_task() -> Task | None:
            return waiting.pop() if waiting else None

        context.pump.run(next_task, self._finish)
        return context.log.records[number]

    def _task(self, record: TrialRecord, steps: GradientSteps | None) -> Task:
        """The task of a trial, with the rule that could stop it by what was known then."""
        known = self._known(record)
        rule = None
        if record.suggestion is not None and record.item_count is None:
            rule = self._early_stopping.rule(record.suggestion, known)
        return replace(
            self._measurer.task(record),
            point=None if steps is None else record.point,
            gradient_steps=steps,
            early_stop_rule=rule,
        )

    def _known(self, record: TrialRecord) -> list[TrialRecord]:
        """Trials as they stood when this one was asked."""
        return [
            other
            for other in self._context.log.records[: record.number]
            if other.tell_index is None or other.tell_index < record.tells_at_ask
        ]

    def _finish(self, outcome: Outcome) -> None:
        log = self._context.log
        record = log.records[int(outcome.task)]
        estimates = None
        if outcome.stopped is not None and outcome.measurement is not None:
            estimates = self._early_stopping.estimates(
                outcome.measurement, outcome.stopped, self._known(record)
            )
        told = log.tell(record.number, outcome, record.told_at, estimates)
        self._budget.add_finished(told)
        self._context.reporter.announce(told, 0, 0)
        self._context.reporter.count(told)
