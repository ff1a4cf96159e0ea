"""The search phase of a study: ask the strategy, record, run, record again, tell the strategy."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mergesearch.search.fidelity.rules import Estimates
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.strategies.base import Strategy
from mergesearch.search.study.asking import ask_suggested, gradient_items_of
from mergesearch.search.study.budget import BudgetTracker
from mergesearch.search.study.context import StudyContext
from mergesearch.search.study.early_stopping import EarlyStopping
from mergesearch.search.study.events import Event
from mergesearch.search.study.measuring import Measurer
from mergesearch.search.study.problem import trial_result
from mergesearch.search.workers.gradient_steps import GradientSteps
from mergesearch.search.workers.messages import Outcome, Task


class SearchPhase:
    """Runs the trials that a strategy asks for, until the budget is spent.

    Args:
        context: The study.
        measurer: Knows the references that tasks need.
        strategy: Where the record stands.
        budget: What may still be spent.
        early_stopping: Which rule may stop a trial.
        expected: Number of suggestions that the strategy expects.
        gradient_steps: Trial number -> its gradient steps, for trials that run since an earlier
            session.
    """

    def __init__(
        self,
        context: StudyContext,
        measurer: Measurer,
        strategy: Strategy,
        budget: BudgetTracker,
        early_stopping: EarlyStopping,
        expected: int,
        gradient_steps: dict[int, GradientSteps],
    ) -> None:
        self._context = context
        self._measurer = measurer
        self._strategy = strategy
        self._budget = budget
        self._early_stopping = early_stopping
        self._gradient_steps = dict(gradient_steps)  # of the trials that have no result yet
        records = context.records("search")
        self._waiting = deque(record for record in records if record.state == "running")
        self._tells = sum(record.tell_index is not None for record in records)
        by_time = context.plan.search_trials is None
        sized = any(record.item_count is not None for record in records)
        self._total = 0 if by_time or sized else expected  # 0: not known
        self._over = bool(context.log.get_attr("searched"))

    def run(self) -> None:
        """Search, or finish a search that was interrupted."""
        context = self._context
        context.notify(Event("phase", "search", done=self._tells, total=self._total))
        context.pump.run(self._next_task, self._finish)
        if not self._over and context.plan.recommended_trials and not self._strategy.best():
            # There is nothing to recommend, so the trial kept back for it goes to the search.
            self._budget.release()
            context.pump.run(self._next_task, self._finish)
        context.log.set_attr("searched", True)

    def _next_task(self) -> Task | None:
        if self._waiting:
            return self._task(self._waiting.popleft())
        asking = not self._over and self._budget.allows()
        suggestions = self._strategy.ask(1) if asking else []
        if not suggestions:
            return None
        suggestion = suggestions[0]
        plan = self._context.plan
        if not self._budget.allows(suggestion.items, gradient_items_of(plan, suggestion)):
            self._over = True
            return None
        if suggestion.items is not None:
            self._total = 0  # how many trials will fit depends on their sizes
        items = self._early_stopping.items
        record = ask_suggested(plan, self._context.log, suggestion, self._tells, items)
        if suggestion.gradient_steps is not None:
            self._gradient_steps[record.number] = suggestion.gradient_steps
        return self._task(record)

    def _task(self, record: TrialRecord) -> Task:
        """The task of a trial, with the rule that may stop it by what is known now."""
        assert record.suggestion is not None
        steps = self._gradient_steps.get(record.number)
        rule = None
        if record.item_count is None and not _stopped_before(record, self._context.log.records):
            rule = self._early_stopping.rule(record.suggestion, self._context.log.records)
        return replace(
            self._measurer.task(record),
            point=None if steps is None else record.point,
            gradient_steps=steps,
            early_stop_rule=rule,
        )

    def _finish(self, outcome: Outcome) -> None:
        log = self._context.log
        record = log.tell(int(outcome.task), outcome, self._tells, self._estimates(outcome))
        self._gradient_steps.pop(record.number, None)
        self._budget.add_finished(record)
        self._tells += 1
        normaliser = self._early_stopping.normaliser
        self._strategy.tell([trial_result(self._context.plan, record, normaliser)])
        self._context.reporter.report(record, outcome.failure, self._tells, self._total)

    def _estimates(self, outcome: Outcome) -> Estimates | None:
        """Estimates of what a stopped trial would have scored on all items."""
        if outcome.stopped is None or outcome.measurement is None:
            return None
        return self._early_stopping.estimates(
            outcome.measurement, outcome.stopped, self._context.log.records
        )


def _stopped_before(record: TrialRecord, records: Sequence[TrialRecord]) -> bool:
    """Whether a rule stopped an earlier trial at the same point.

    A strategy that asks for it again wants to know its loss on all items: the same rule would only
    repeat what is known.
    """
    return any(
        other.stopped is not None and np.array_equal(other.point, record.point)
        for other in records[: record.number]
        if other.point is not None and record.point is not None
    )
