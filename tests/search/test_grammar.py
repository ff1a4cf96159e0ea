"""Counts in sentences."""

from __future__ import annotations

from mergesearch.search.grammar import counted, times


def test_one_has_no_plural() -> None:
    assert [counted(count, "trial") for count in (0, 1, 12)] == ["0 trials", "1 trial", "12 trials"]


def test_times_have_names_up_to_two() -> None:
    assert [times(count) for count in (1, 2, 3)] == ["once", "twice", "3 times"]
