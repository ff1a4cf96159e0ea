"""Replay: a freshly seeded strategy is brought to where the record stands.

The record holds when each trial was asked and told, so repeating its asks and tells in that order
gives the strategy the state that it had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np

from mergesearch.merging import ReplayError
from mergesearch.search.front import Normaliser
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.allowances import Allowance
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.strategies.base import (
    Point,
    Problem,
    Strategy,
    Suggestion,
    TrialResult,
    tell_budget,
)
from mergesearch.search.study.asking import item_count_of
from mergesearch.search.study.problem import result_of_others, trial_result
from mergesearch.search.study.restoring import Restorer
from mergesearch.search.workers.gradient_steps import GradientSteps

#: How far a replayed point may lie from the recorded one, relative to the range of its coordinate.
REPLAY_TOLERANCE = 1e-9


class Replay:
    """Repeats the recorded asks and tells of a study.

    Args:
        plan: The study.
        normaliser: Scale of the objectives.
        items: Number of search items.
        trust_log: Go on from the recorded points even where replay does not reproduce them.
        restorer: Measures what a repair of the journal could not recover.
    """

    def __init__(
        self,
        plan: Plan,
        normaliser: Normaliser,
        items: int,
        *,
        trust_log: bool,
        restorer: Restorer,
    ) -> None:
        self._plan = plan
        self._normaliser = normaliser
        self._items = items
        self._trust_log = trust_log
        self._restorer = restorer

    def run(
        self,
        strategy: Strategy,
        problem: Problem,
        records: Sequence[TrialRecord],
        changes: Sequence[Allowance] = (),
    ) -> dict[int, GradientSteps]:
        """Repeat the recorded interleaving of asks, tells and changes of the budget.

        Args:
            strategy: Freshly seeded; afterwards it is where the record stands.
            problem: What it was told of the study.
            records: Trials of the search, by number.
            changes: Other budgets that it was told while it searched, in order.

        Returns:
            Trial number -> its gradient steps, for trials that are still running.

        Raises:
            ReplayError: If the strategy does not ask the recorded points.
        """
        gradient_steps: dict[int, GradientSteps] = {}
        asks = deque(record for record in records if record.retry_of is None)
        budgets = _Budgets(strategy, changes)
        tells = _in_order(records)
        width = np.maximum(problem.upper - problem.lower, np.finfo(float).tiny)
        for told in range(len(tells) + 1):
            budgets.reach(told)
            while asks and asks[0].tells_at_ask == told:
                record = asks.popleft()
                suggestions = strategy.ask(1)
                budgets.asked += 1
                if record.lost:
                    record = self._restorer.ask(record, suggestions)
                self._check(record, suggestions, width)
                steps = suggestions[0].gradient_steps if suggestions else None
                if steps is not None and record.state == "running":
                    gradient_steps[record.number] = steps
                budgets.reach(told)
            if told < len(tells):
                record = tells[told]
                if any(record is waiting for waiting in asks):
                    raise ReplayError(
                        f"trial {record.number}: expected a result after its question, received "
                        f"result {told} before it; start another --run"
                    )
                if record.state == "running":
                    steps = gradient_steps.pop(record.number, None)
                    record = self._restorer.measure(record.number, steps)
                strategy.tell(self._results(record))
        if asks:
            raise ReplayError(
                f"trial {asks[0].number} was asked after {asks[0].tells_at_ask} results, the log "
                "holds fewer"
            )
        return gradient_steps

    def _results(self, record: TrialRecord) -> list[TrialResult]:
        """What the strategy was told of a finished trial."""
        if record.retry_of is None:
            return [trial_result(self._plan, record, self._normaliser)]
        other = result_of_others(self._plan, record, self._normaliser)
        return [] if other is None else [other]

    def _check(self, record: TrialRecord, suggestions: list[Suggestion], width: Point) -> None:
        """Refuse suggestions that are not the recorded trial, unless the log is trusted."""
        if self._trust_log or self._same(record, suggestions, width):
            return
        raise ReplayError(
            f"trial {record.number}: expected the recorded point, replay gave another; the log was "
            "written by other versions or on another machine (see environment.json); `mergesearch "
            "run --trust-log` goes on from the record"
        )

    def _same(self, record: TrialRecord, suggestions: list[Suggestion], width: Point) -> bool:
        assert record.point is not None
        return (
            len(suggestions) == 1
            and suggestions[0].id == record.suggestion
            and item_count_of(suggestions[0], self._items) == record.item_count
            and bool(
                np.all(np.abs(suggestions[0].point - record.point) <= REPLAY_TOLERANCE * width)
            )
        )


def _in_order(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Trials in the order in which the strategy was told them.

    One whose result a repair could not recover stands where it was told, without a result.

    Raises:
        ReplayError: If a place has no trial, or two.
    """
    places: dict[int, TrialRecord] = {}
    for record in records:
        place = record.told_at if record.state == "running" else record.tell_index
        if place is not None and place in places:
            raise ReplayError(
                f"trial {record.number}: expected a place of its own in the order of results, "
                f"received {place}, which trial {places[place].number} has; start another --run"
            )
        if place is not None:
            places[place] = record
    missing = next((place for place in range(len(places)) if place not in places), None)
    if missing is not None:
        raise ReplayError(
            f"the log lacks result {missing} of those that the strategy was told; start another "
            "--run, with `start.scores` for what this one has"
        )
    return [places[place] for place in range(len(places))]


class _Budgets:
    """Tells a strategy other budgets where the record says that it was told them.

    Attributes:
        asked: Suggestions so far.
    """

    def __init__(self, strategy: Strategy, changes: Sequence[Allowance]) -> None:
        self._strategy = strategy
        self._left = deque(changes)
        self.asked = 0

    def reach(self, told: int) -> None:
        """Tell what is due after so many asks and tells."""
        while self._left and (self._left[0].asked, self._left[0].told) == (self.asked, told):
            suggestions = self._left.popleft().suggestions
            assert suggestions is not None
            tell_budget(self._strategy, suggestions)


def one_blas_thread() -> AbstractContextManager[object]:
    """Run a strategy's linear algebra on one thread.

    With more threads the bits depend on their number, and so would replay. Torch brings a library
    of its own, which this does not touch.
    """
    import scipy.linalg  # noqa: F401  # the limit reaches libraries that are loaded
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits
