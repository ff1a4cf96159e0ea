"""Strengths from choices: against references, on simulated judges, and by their symmetries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.evaluators.preference.strengths import Comparison, Strengths, fit_strengths

NAMES = ("base", "one", "two", "three")


def compared(one: str, other: str, wins: int, losses: int, ties: int = 0) -> list[Comparison]:
    return [
        *[Comparison(one, other, one)] * wins,
        *[Comparison(one, other, other)] * losses,
        *[Comparison(one, other, None)] * ties,
    ]


def values(fit: Strengths) -> dict[str, float]:
    return {name: strength.value for name, strength in fit.of.items()}


MIXED = [
    *compared("one", "base", 5, 2, 1),
    *compared("two", "base", 1, 6, 3),
    *compared("one", "two", 4, 1),
    *compared("three", "one", 8, 0),
]


class TestReferences:
    def test_two_models_have_a_closed_form(self) -> None:
        """Davidson's estimates are log(wins / losses), and log(ties / sqrt(wins losses))."""
        fit = fit_strengths(compared("one", "base", 12, 3, 5), "base", prior_sd=1e6, tie_sd=1e6)
        assert fit.of["one"].value == pytest.approx(math.log(12 / 3), abs=1e-9)
        assert fit.tie == pytest.approx(math.log(5 / math.sqrt(12 * 3)), abs=1e-9)
        assert (fit.of["base"].value, fit.of["base"].error) == (0.0, 0.0)

    def test_without_ties_the_error_is_that_of_a_log_odds(self) -> None:
        fit = fit_strengths(compared("one", "base", 12, 3), "base", prior_sd=1e6, tie_sd=20.0)
        assert fit.of["one"].error == pytest.approx(math.sqrt(1 / 12 + 1 / 3), rel=0.02)

    def test_agrees_with_a_general_optimiser(self) -> None:
        from scipy.optimize import minimize

        def loss(parameters: Any) -> float:
            theta = dict(zip(NAMES, [0.0, *parameters[:3]], strict=True))
            total = float(np.sum(np.square(parameters))) / (2 * 2.0**2)
            for each in MIXED:
                i, j = math.exp(theta[each.one]), math.exp(theta[each.other])
                tie = math.exp(parameters[3]) * math.sqrt(i * j)
                chance = {each.one: i, each.other: j, None: tie}[each.preferred]
                total -= math.log(chance / (i + j + tie))
            return total

        found = minimize(loss, np.zeros(4), tol=1e-12)
        fit = fit_strengths(MIXED, "base")
        ours = [values(fit)[name] for name in NAMES[1:]]
        np.testing.assert_allclose([*ours, fit.tie], found.x, atol=1e-5)
        errors = [fit.of[name].error for name in NAMES[1:]]
        np.testing.assert_allclose(errors, np.sqrt(np.diag(found.hess_inv))[:3], rtol=0.05)

    def test_a_model_that_is_always_preferred_has_a_finite_strength(self) -> None:
        fit = fit_strengths(compared("one", "base", 500, 0), "base")
        assert 2 < fit.of["one"].value < 12

    def test_without_choices_there_is_the_base_alone(self) -> None:
        assert values(fit_strengths([], "base")) == {"base": 0.0}


def simulated(truth: dict[str, float], tie: float, count: int, seed: int) -> list[Comparison]:
    """Choices of judges who follow the model."""
    rng = np.random.default_rng(seed)
    choices = []
    for _ in range(count):
        one, other = rng.choice(sorted(truth), size=2, replace=False).tolist()
        mean = (truth[one] + truth[other]) / 2
        chances = np.exp([truth[one], truth[other], tie + mean])
        outcome = rng.choice(3, p=chances / chances.sum())
        choices.append(Comparison(one, other, (one, other, None)[outcome]))
    return choices


def test_converges_to_the_strengths_of_simulated_judges() -> None:
    truth = {"base": 0.0, "one": 1.0, "two": -0.5, "three": 2.0}
    fit = fit_strengths(simulated(truth, -0.5, 3_000, seed=3), "base")
    for name, value in truth.items():
        assert abs(fit.of[name].value - value) <= 4 * fit.of[name].error + 1e-12
    assert max(strength.error for strength in fit.of.values()) < 0.15
    assert fit.tie == pytest.approx(-0.5, abs=0.2)


def test_errors_cover_as_often_as_they_say() -> None:
    truth = {"base": 0.0, "one": 0.7, "two": -0.4}
    fits = [fit_strengths(simulated(truth, -1.0, 60, seed), "base") for seed in range(60)]
    inside = [abs(fit.of["one"].value - 0.7) < 2 * fit.of["one"].error for fit in fits]
    assert sum(inside) >= 52  # 95 % of 60 are 57


COMPARISONS = st.lists(
    st.builds(
        lambda pair, outcome: Comparison(*pair, [*pair, None][outcome]),
        st.permutations(NAMES).map(lambda names: (names[0], names[1])),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=40,
)


class TestSymmetries:
    @settings(max_examples=25, deadline=None)
    @given(COMPARISONS, st.randoms(use_true_random=False))
    def test_order_and_sides_have_no_effect(self, choices: list[Comparison], rng: Any) -> None:
        other = [Comparison(c.other, c.one, c.preferred) for c in choices]
        rng.shuffle(other)
        assert fit_strengths(other, "base") == fit_strengths(choices, "base")

    @settings(max_examples=25, deadline=None)
    @given(COMPARISONS)
    def test_the_opposite_choices_give_the_opposite_strengths(
        self, choices: list[Comparison]
    ) -> None:
        swap = [
            Comparison(
                c.one,
                c.other,
                None if c.preferred is None else c.other if c.preferred == c.one else c.one,
            )
            for c in choices
        ]
        ours, theirs = values(fit_strengths(choices, "base")), values(fit_strengths(swap, "base"))
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(-value, abs=1e-6)

    @settings(max_examples=25, deadline=None)
    @given(COMPARISONS)
    def test_a_preference_and_its_mirror_image_bring_equal_models_no_apart(
        self, choices: list[Comparison]
    ) -> None:
        both = [Comparison(c.one, c.other, who) for c in choices for who in (c.one, c.other)]
        assert all(abs(value) < 1e-9 for value in values(fit_strengths(both, "base")).values())

    def test_another_win_never_lowers_a_strength(self) -> None:
        before = values(fit_strengths(MIXED, "base"))["two"]
        more = [*MIXED, Comparison("two", "three", "two")]
        assert values(fit_strengths(more, "base"))["two"] > before

    def test_the_same_choices_give_the_same_bits(self) -> None:
        assert fit_strengths(MIXED, "base") == fit_strengths(list(MIXED), "base")
