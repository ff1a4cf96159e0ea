"""What a study may spend, and since when: budgets change during its life.

The first entry is what the study began with. Every later one says where in the record the budget
changed, and how many suggestions the strategy was told to expect from there on, so that a replay
tells it the same at the same place. A study whose budget never changed has no entries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from mergesearch.merging import RunFolderError
from mergesearch.merging.foreign.shown import cut, name_shown, shown
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
        tested: Whether scores on test items were there to be seen by then.
    """

    budget: BudgetSection
    trial: int = 0
    asked: int = 0
    told: int = 0
    suggestions: int | None = None
    tested: bool = False


def allowances(log: TrialLog) -> list[Allowance]:
    """All that a study was allowed to spend, the latest last; empty while it never changed."""
    return [_allowance(entry) for entry in log.get_attr(ALLOWANCES) or ()]


def add_allowance(log: TrialLog, new: Allowance) -> None:
    """Record a change; it is in force from the next trial on."""
    tested = any(log.results.score("test", record.number)[0] for record in log.records)
    entries = [*allowances(log), replace(new, tested=tested)]
    log.set_attr(ALLOWANCES, [asdict(e) | {"budget": e.budget.model_dump()} for e in entries])


def changes_after_test(log: TrialLog) -> list[str]:
    """A sentence for each change of the budget that may have been made for the test scores."""
    known = allowances(log)
    return [
        f"The budget was {_change(before.budget, after.budget)} after test scores had been shown; "
        "whoever goes on because of them makes the new ones look too good."
        for before, after in pairwise(known)
        if after.tested
    ]


def _change(before: BudgetSection, after: BudgetSection) -> str:
    """``raised from 40 to 80 trials``."""
    parts = []
    for key in BudgetSection.model_fields:
        old = getattr(before, key)
        new = getattr(after, key)
        if old != new:
            raised = new is None or (old is not None and new > old)
            limits = ["no limit" if limit is None else _number(limit) for limit in (old, new)]
            noun = key.replace("_", "-")
            parts.append(f"{'raised' if raised else 'changed'} from {' to '.join(limits)} {noun}")
    return " and ".join(parts)


def _number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def first_budget(recorded: Any) -> BudgetSection | None:
    """What a study began with, from the recorded attribute; None where it never changed."""
    return _allowance(recorded[0]).budget if recorded else None


def recorded_budget(data: Any) -> BudgetSection:
    """A budget as it is recorded.

    Raises:
        RunFolderError: If it is none.
    """
    try:
        return BudgetSection.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, problem["loc"][:3]))
        raise RunFolderError(
            f"record: budget: {name_shown(place)}: {cut(problem['msg'], 150)}, received "
            f"{shown(problem['input'], 40)}"
        ) from None


def _allowance(entry: dict[str, Any]) -> Allowance:
    return Allowance(**{**entry, "budget": recorded_budget(entry["budget"])})
