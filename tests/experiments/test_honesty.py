"""A small cut of experiment 9: what reports claim, against what is true."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.e0009_honesty import ITEMS, KINDS, run_one, share
from experiments.item_problem import ItemProblem


@pytest.mark.parametrize("kind", KINDS)
def test_no_gain_is_claimed_that_is_none_and_intervals_hold(kind):
    nothing = [run_one(kind, seed, effect=False) for seed in range(2)]
    something = [run_one(kind, seed, effect=True) for seed in range(2)]
    assert not any(study["false"] for study in [*nothing, *something])
    assert not any(study["claimed"] for study in nothing)
    assert any(study["claimed"] for study in something)
    assert sum(study["covered"] for study in [*nothing, *something]) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_studies_hold_the_same(kind):
    nothing = [run_one(kind, seed, effect=False) for seed in range(1000, 1060)]
    something = [run_one(kind, seed, effect=True) for seed in range(1000, 1060)]
    assert sum(bool(study["false"]) for study in [*nothing, *something]) <= 3
    assert np.mean([study["covered"] for study in something]) > 0.88
    assert np.mean([bool(study["claimed"]) for study in something]) > 0.5


@pytest.mark.parametrize("effect", [False, True])
def test_the_truth_of_the_problem_is_the_mean_over_many_items(effect):
    problem = ItemProblem(6, 1, {**ITEMS, "test": 200_000}, effect=effect)
    for point in (problem.start, problem.optima[0], np.full(6, 0.5)):
        measured = problem.scores(point, "test").mean(axis=1)
        np.testing.assert_allclose(measured, problem.truth(point), atol=0.01)
    truths = [problem.truth(point)[0] for point in (problem.start, problem.optima[0])]
    assert (truths[1] - truths[0] > 0.1) == effect


def test_a_share_has_the_interval_of_wilson():
    # Newcombe 1998, table I: 15 of 148.
    assert share([True] * 15 + [False] * 133) == "10.1 (6.2 to 16.0)"
