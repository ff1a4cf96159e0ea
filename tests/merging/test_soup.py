"""Greedy soup: the order of tasting, what stays, and the coefficients that average it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merging import InputError, merge
from merging.soup import Soup, Tasting, greedy_soup, soup_coefficients

SCORES = {"a": 0.6, "b": 0.9, "c": 0.8, "d": 0.8}


def test_keeps_what_does_not_lower_the_score_of_the_average() -> None:
    averages = {("b", "c"): 0.9, ("b", "c", "d"): 0.85, ("b", "c", "a"): 0.95}
    assert greedy_soup(SCORES, averages.__getitem__) == Soup(
        chosen=("b", "c", "a"),
        score=0.95,
        history=(Tasting("b", 0.9, True), Tasting("c", 0.9, True), Tasting("d", 0.85, False), Tasting("a", 0.95, True)),
    )


def test_minimizing_is_maximizing_the_negative() -> None:
    averages = {("b", "c"): 0.9, ("b", "c", "d"): 0.85, ("b", "c", "a"): 0.95}
    mirrored = greedy_soup({k: -v for k, v in SCORES.items()}, lambda names: -averages[names], "minimize")
    assert mirrored.chosen == ("b", "c", "a")
    assert mirrored.score == -0.95


def test_a_score_of_nan_does_not_stay() -> None:
    assert greedy_soup({"a": 1.0, "b": 0.0}, lambda _: float("nan")).chosen == ("a",)
    assert greedy_soup({"a": 1.0, "b": 2.0}, lambda _: float("nan"), "minimize").chosen == ("a",)


def test_refuses_experts_without_scores() -> None:
    with pytest.raises(InputError, match=r"greedy soup: .* received none"):
        greedy_soup({}, lambda _: 0.0)
    with pytest.raises(InputError, match="greedy soup: expected a score other than NaN"):
        greedy_soup({"a": float("nan")}, lambda _: 0.0)


def test_drives_the_operator_average_to_an_average_no_worse_than_the_best_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(50, generator=generator)
    base = {"w": torch.zeros(50)}
    experts = {name: {"w": goal + torch.randn(50, generator=generator)} for name in "abcdef"}

    def average(chosen: tuple[str, ...]) -> torch.Tensor:
        coefficients = soup_coefficients(chosen, list(experts))
        return merge(base, experts, operator="average", coefficients=coefficients)["w"]

    def error(chosen: tuple[str, ...]) -> float:
        return float((average(chosen) - goal).norm())

    scores = {name: error((name,)) for name in experts}
    soup = greedy_soup(scores, error, "minimize")
    assert soup.score == error(soup.chosen) < min(scores.values())
    np.testing.assert_allclose(
        average(soup.chosen), torch.stack([experts[name]["w"] for name in soup.chosen]).mean(0), atol=1e-6
    )


@pytest.mark.parametrize("chosen", [(), ("a", "a"), ("z",)])
def test_refuses_to_average_what_is_not_there(chosen: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"soup: expected distinct names among \['a', 'b'\]"):
        soup_coefficients(chosen, ["a", "b"])
