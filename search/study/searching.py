"""The search phase of a study: ask the strategy, record, run, record again, tell the strategy."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from mergesearch.search.fidelity.rules import EarlyStopRule, Estimates
from mergesearch.search.record.study_attributes import SEARCHED
from mergesearch.search.record.trial_record import TrialRecord, standing_failures
from mergesearch.search.strategies.base import Point, Strategy, Suggestion
from mergesearch.search.study.asking import (
    ask_again,
    ask_suggested,
    gradient_items_of,
    item_count_of,
)
from mergesearch.search.study.attempts import suggested, tells_of, trials_of_search
from mergesearch.search.study.budget import BudgetTracker
from mergesearch.search.study.context import StudyContext
from mergesearch.search.study.early_stopping import EarlyStopping
from mergesearch.search.study.events import Event
from mergesearch.search.study.known_merges import answer
from mergesearch.search.study.measuring import Measurer
from mergesearch.search.study.problem import result_of_others, trial_result
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
        retry_failed: Whether failed trials are measured again first.
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
        *,
        retry_failed: bool = False,
    ) -> None:
        self._context = context
        self._measurer = measurer
        self._strategy = strategy
        self._budget = budget
        self._early_stopping = early_stopping
        self._gradient_steps = dict(gradient_steps)  # of the trials that have no result yet
        if retry_failed:
            self._ask_failed_again()
        records = trials_of_search(context.log.records)
        self._waiting = deque(record for record in records if record.state == "running")
        self._tells = tells_of(records)
        # Suggestions that have a result.
        self._done = sum(record.state != "running" for record in suggested(records))
        by_time = context.plan.search_trials is None
        sized = any(record.item_count is not None for record in records)
        self._total = 0 if by_time or sized else expected  # 0: not known
        self._over = bool(context.log.get_attr(SEARCHED))

    def run(self) -> None:
        """Search, or finish a search that was interrupted."""
        context = self._context
        context.notify(Event("phase", "search", done=self._done, total=self._total))
        context.pump.run(self._next_task, self._finish)
        if not self._over and context.plan.recommended_trials and not self._new_recommendations():
            # There is nothing to recommend, so the trial kept back for it goes to the search.
            self._budget.release()
            context.pump.run(self._next_task, self._finish)
        context.log.set_attr(SEARCHED, True)

    def _new_recommendations(self) -> list[Point]:
        """What the strategy recommends, unless that was measured before the budget changed."""
        measured = self._context.records("recommended")
        known = {record.point.tobytes() for record in measured if record.point is not None}
        return [point for point in self._strategy.best()[:1] if point.tobytes() not in known]

    def _ask_failed_again(self) -> None:
        """Record other attempts at all trials that failed, together."""
        context = self._context
        with context.log.batched_writes():
            for failed in standing_failures(context.log.records):
                if failed.kind != "recommended":
                    ask_again(context.plan, context.log, failed)

    def _next_task(self) -> Task | None:
        """The next trial that is to be measured; those that the record answers end at once."""
        while (record := self._next_record()) is not None:
            task = self._task(record)
            outcome = answer(record, self._context.log.records, task.early_stop_rule)
            if outcome is None:
                return task
            self._finish(outcome)
        return None

    def _next_record(self) -> TrialRecord | None:
        """The next trial: one that runs since an earlier session, or a new suggestion."""
        if self._waiting:
            return self._waiting.popleft()
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
        return self._ask(suggestion)

    def _ask(self, suggestion: Suggestion) -> TrialRecord:
        """Record a suggestion, with the trial that has measured its merge."""
        context = self._context
        items = self._early_stopping.items
        recipe = context.plan.space.decode(suggestion.point)
        same_as = None
        if suggestion.gradient_steps is None:
            count = item_count_of(suggestion, items)
            number = len(context.log.records)
            rule = partial(self._rule, suggestion.id, suggestion.point, count, number)
            same_as = context.known.find(recipe, count, rule)
        record = ask_suggested(
            context.plan, context.log, suggestion, recipe, self._tells, items, same_as
        )
        context.known.add(record)
        if suggestion.gradient_steps is not None:
            self._gradient_steps[record.number] = suggestion.gradient_steps
        return record

    def _task(self, record: TrialRecord) -> Task:
        """The task of a trial, with the rule that may stop it by what is known now."""
        steps = self._gradient_steps.get(record.number)
        rule = self._rule(record.suggestion, record.point, record.item_count, record.number)
        return replace(
            self._measurer.task(record),
            point=None if steps is None else record.point,
            gradient_steps=steps,
            early_stop_rule=rule,
        )

    def _rule(
        self, suggestion: int | None, point: Point | None, item_count: int | None, number: int
    ) -> EarlyStopRule | None:
        """The rule that may stop a trial by what is known now.

        Args:
            suggestion: Its suggestion; None for another attempt, which no rule stops.
            point: Its position.
            item_count: Items that it is evaluated on; no rule stops one on some of them.
            number: Its number.
        """
        records = self._context.log.records
        if suggestion is None or item_count is not None:
            return None
        rule = self._early_stopping.rule(suggestion, records)
        # A look at all earlier trials, which studies without a rule are spared.
        if rule is None or _stopped_before(point, records[:number]):
            return None
        return rule

    def _finish(self, outcome: Outcome) -> None:
        context = self._context
        number = int(outcome.task)
        index = self._tells if self._is_told(context.log.records[number], outcome) else None
        record = context.log.tell(number, outcome, index, self._estimates(outcome))
        self._gradient_steps.pop(record.number, None)
        self._budget.add_finished(record)
        if index is not None:
            self._tells += 1
            normaliser = self._early_stopping.normaliser
            told = result_of_others if record.retry_of is not None else trial_result
            result = told(context.plan, record, normaliser)
            assert result is not None
            self._strategy.tell([result])
        self._done += record.retry_of is None
        context.reporter.announce(record, self._done, self._total)
        context.reporter.count(record)

    def _is_told(self, record: TrialRecord, outcome: Outcome) -> bool:
        """Whether the strategy is told a result.

        Of another attempt at a failed trial it is told nothing new unless that has succeeded, and
        the space holds it.
        """
        if record.retry_of is None:
            return True
        held = record.point is not None or self._context.plan.point_of(record.recipe) is not None
        return held and outcome.measurement is not None

    def _estimates(self, outcome: Outcome) -> Estimates | None:
        """Estimates of what a stopped trial would have scored on all items."""
        if outcome.stopped is None or outcome.measurement is None:
            return None
        return self._early_stopping.estimates(
            outcome.measurement, outcome.stopped, self._context.log.records
        )


def _stopped_before(point: Point | None, earlier: Sequence[TrialRecord]) -> bool:
    """Whether a rule stopped an earlier trial at the same point.

    A strategy that asks for it again wants to know its loss on all items: the same rule would only
    repeat what is known.
    """
    return any(
        other.stopped is not None and np.array_equal(other.point, point)
        for other in earlier
        if other.point is not None and point is not None
    )
