"""The book of suggestions: ids, tickets, and the order of what is outstanding."""

from __future__ import annotations

import numpy as np

from mergesearch.search.strategies.base import Suggestion, TrialResult
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook

POINT = np.zeros(2)


def result(id: int | None) -> TrialResult:
    return TrialResult(id, POINT, None)


def test_ids_count_from_zero_over_own_and_relayed_suggestions() -> None:
    book = SuggestionBook[str]()
    relayed = Suggestion(7, POINT, items=3, notes={"gap": 0.5})
    suggestions = [book.issue(POINT), book.relay(relayed, "inner"), book.issue(POINT, items=1)]
    assert [suggestion.id for suggestion in suggestions] == [0, 1, 2]
    assert [suggestion.items for suggestion in suggestions] == [None, 3, 1]
    assert suggestions[1].notes == {"gap": 0.5}
    assert book.issued == 3


def test_a_ticket_is_given_back_once_and_only_for_its_own_trial() -> None:
    book = SuggestionBook[str]()
    book.issue(POINT, "first")
    assert book.redeem(result(None)) is None
    assert book.redeem(result(5)) is None
    assert book.redeem(result(0)) == "first"
    assert book.redeem(result(0)) is None


def test_outstanding_tickets_stand_in_the_order_of_the_asks() -> None:
    book = SuggestionBook[str]()
    for ticket in "abc":
        book.issue(POINT, ticket)
    book.issue(POINT)
    book.redeem(result(1))
    assert book.outstanding == ["a", "c"]
