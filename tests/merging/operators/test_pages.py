"""The generated pages: plain Markdown, names that a reader can import, rounded numbers."""

from __future__ import annotations

import re

import pytest

from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.operators.pages import operator_row, pages, prose, shown

PAGES = pages()


@pytest.mark.parametrize("name", PAGES)
def test_no_page_has_a_cross_reference_of_docstrings(name: str) -> None:
    assert re.findall(r":[a-z]+:`[^`]*`", PAGES[name]) == []


@pytest.mark.parametrize("name", PAGES)
def test_modules_are_named_as_they_are_imported(name: str) -> None:
    bare = r"(?<![\w.])(?:merging|spaces|evaluators|search)\.[a-z]\w*"
    assert re.findall(bare, PAGES[name]) == []


@pytest.mark.parametrize("name", PAGES)
def test_numbers_have_few_digits(name: str) -> None:
    assert re.findall(r"\d\.\d{5,}", PAGES[name]) == []


@pytest.mark.parametrize("name", PAGES)
def test_no_page_has_sections_for_callers(name: str) -> None:
    assert "Raises:" not in PAGES[name]


def test_the_outermost_description_of_a_hyperparameter_counts() -> None:
    assert "probability with which dare_ties drops a coordinate" in PAGES["spectral.md"]


def test_a_cross_reference_becomes_code() -> None:
    assert prose("See :func:`~a.b.c`,\n    and :class:`D`.") == "See `a.b.c`,\nand `D`."
    assert prose(None) == ""


def test_values_are_shown_with_four_significant_digits() -> None:
    assert shown(1 / 3) == "0.3333"
    assert shown([0.1, 2 / 3, 300.0]) == "[0.1, 0.6667, 300]"
    assert [shown(value) for value in (1e-6, 12345, "ties", None, True)] == [
        "1e-06",
        "12345",
        "ties",
        "None",
        "True",
    ]


def test_every_operator_says_when_to_use_it() -> None:
    silent = [name for name, one in OPERATORS.own.items() if not operator_row(one).get("when")]
    assert silent == []
    for operator in OPERATORS.own.values():
        assert f"Use it {operator.when}." in PAGES[f"{operator.family}.md"]
