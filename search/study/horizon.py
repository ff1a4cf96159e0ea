"""How many suggestions a strategy is told to expect, in every stretch of a study's life.

A budget may change while a study is interrupted, or after it has ended. Every change is recorded
with its place among asks and tells, and with the number of suggestions that was told, so that every
later session tells the same at the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.allowances import Allowance, add_allowance, allowances
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.study.attempts import suggested, tells_of

#: Attribute of a study whose budget is a time: suggestions that its strategy expects at first.
SUGGESTIONS = "suggestions"


class Horizon:
    """The numbers of suggestions that the strategy of a study expects.

    Args:
        plan: The study, with the budget that it has now.
        log: Its trial log.
        by_time: Number of suggestions that the time of the present budget allows.
    """

    def __init__(self, plan: Plan, log: TrialLog, by_time: Callable[[], int]) -> None:
        self._plan = plan
        self._log = log
        self._by_time = by_time

    def note_change(self) -> None:
        """Record the present budget where it is not the one of the last session."""
        known = allowances(self._log)
        budget = self._plan.spec.budget
        if not known or known[-1].budget == budget:
            return
        records = self._log.records
        asked = len(suggested(records))
        measured = sum(r.kind == "recommended" and r.retry_of is None for r in records)
        trials = self._plan.search_trials
        expected = self._by_time() if trials is None else trials - measured
        suggestions = max(expected, asked)
        new = Allowance(budget, len(records), asked, tells_of(records), suggestions)
        add_allowance(self._log, new)

    @property
    def first(self) -> int:
        """What the strategy expects before its first suggestion."""
        known = allowances(self._log)
        early = [each.suggestions for each in known if not each.asked and each.suggestions]
        if early:
            return early[-1]
        plan = self._plan
        if known:
            plan = replace(plan, spec=plan.spec.model_copy(update={"budget": known[0].budget}))
        if plan.search_trials is not None:
            return plan.search_trials
        recorded: int | None = self._log.get_attr(SUGGESTIONS)
        if recorded is None:
            recorded = self._by_time()
            self._log.set_attr(SUGGESTIONS, recorded)
        return recorded

    @property
    def changes(self) -> list[Allowance]:
        """Changes of what it expects while it searches, in order."""
        return [each for each in allowances(self._log) if each.asked]

    @property
    def begun(self) -> int:
        """Trials in the log when the present budget came into force."""
        return max((each.trial for each in allowances(self._log)), default=0)

    @property
    def last(self) -> int:
        """What the strategy expects now."""
        later = [each.suggestions for each in self.changes if each.suggestions]
        return later[-1] if later else self.first
