"""The bookkeeping of asks and tells that strategies share: ids, and what each suggestion was for.

A strategy issues every suggestion through its book, with a ticket: whatever it wants back when the
result arrives (a sample, the member that proposed it, the point itself)::

    suggestion = self._book.issue(point, ticket=sample)
    ...
    sample = self._book.redeem(result)      # None: somebody else suggested that trial
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from mergesearch.search.strategies.base import Point, Suggestion, TrialResult
from mergesearch.search.workers.gradient_steps import GradientSteps

Ticket = TypeVar("Ticket")


class SuggestionBook(Generic[Ticket]):
    """Numbers the suggestions of a strategy and keeps the tickets of those without a result.

    Attributes:
        issued: Number of suggestions so far, which is the id of the next one.
    """

    def __init__(self) -> None:
        self.issued = 0
        self._tickets: dict[int, Ticket] = {}

    def issue(
        self,
        point: Point,
        ticket: Ticket | None = None,
        *,
        items: int | None = None,
        gradient_steps: GradientSteps | None = None,
        notes: Mapping[str, float] | None = None,
    ) -> Suggestion:
        """The next suggestion, at ``point`` ``(dim,)``; without a ticket nothing is remembered."""
        suggestion = Suggestion(-1, point, items, gradient_steps, notes or {})
        return self.relay(suggestion, ticket)

    def relay(self, suggestion: Suggestion, ticket: Ticket | None = None) -> Suggestion:
        """The suggestion of a strategy that works for this one, under an id of this one."""
        number = self.issued
        self.issued += 1
        if ticket is not None:
            self._tickets[number] = ticket
        return replace(suggestion, id=number)

    def redeem(self, trial: TrialResult) -> Ticket | None:
        """The ticket of a trial, once; None for trials of others."""
        return None if trial.id is None else self._tickets.pop(trial.id, None)

    @property
    def outstanding(self) -> list[Ticket]:
        """Tickets of the suggestions that have no result yet, in the order of the asks."""
        return list(self._tickets.values())
