"""What a study may spend, and since when: budgets change during its life.

The first entry is what the study began with. Every later one says where in the record the budget
changed, and how many suggestions the strategy was told to expect from there on, so that a replay
tells it the same at the same place. A study whose budget never changed has no entries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mergesearch.search.record.study_attributes import ALLOWANCES
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.spec.sections import BudgetSection


@dataclass(frozen=True)
class Allowance:
    """What a study may spend from some place of its record on.

    Attributes:
        budget: The section ``budget`` of the study.
        trial: Trials in the log at that place.
        asked: Suggestions that the strategy had made by then.
        told: Results that it had been told.
        suggestions: Suggestions in all that it was told to expect from there on; None in the first
            entry, for which the study says it.
    """

    budget: BudgetSection
    trial: int = 0
    asked: int = 0
    told: int = 0
    suggestions: int | None = None


def allowances(log: TrialLog) -> list[Allowance]:
    """All that a study was allowed to spend, the latest last; empty while it never changed."""
    return [_allowance(entry) for entry in log.get_attr(ALLOWANCES) or ()]


def add_allowance(log: TrialLog, new: Allowance) -> None:
    """Record a change; it is in force from the next trial on."""
    entries = [*allowances(log), new]
    log.set_attr(ALLOWANCES, [asdict(e) | {"budget": e.budget.model_dump()} for e in entries])


def first_budget(recorded: Any) -> BudgetSection | None:
    """What a study began with, from the recorded attribute; None where it never changed."""
    return _allowance(recorded[0]).budget if recorded else None


def _allowance(entry: dict[str, Any]) -> Allowance:
    return Allowance(**{**entry, "budget": BudgetSection(**entry["budget"])})
