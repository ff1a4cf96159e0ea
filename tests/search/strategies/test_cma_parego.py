"""CMA-ES for several weightings: the lattice, the scalarisation, and the front that comes of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mergesearch.evaluators.synthetic_problems import make_problem
from mergesearch.search.front import hypervolume
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.cma_es import CmaEs
from mergesearch.search.strategies.cma_parego import CmaParEgo, lattice
from mergesearch.search.strategies.sobol import Sobol


def box(dim: int, objectives: int = 2, start: float = 0.5, budget: int = 500) -> Problem:
    scale = np.tile([0.0, 1.0], (objectives, 1))
    weights = np.full(objectives, 1 / objectives)
    return Problem(
        np.zeros(dim), np.ones(dim), np.full(dim, start), objectives, budget, scale, weights
    )


def search(strategy, losses, trials: int, in_flight: int = 6, seed: int = 0) -> np.ndarray:
    """Losses ``(trials, objectives)`` in the order told."""
    rng = np.random.default_rng(seed)
    outstanding = []
    seen = []
    for _ in range(trials):
        while len(outstanding) < in_flight:
            outstanding += strategy.ask(1)
        done = outstanding.pop(int(rng.integers(len(outstanding))))
        seen.append(losses(done.point))
        strategy.tell([TrialResult(done.id, done.point, seen[-1])])
    return np.array(seen)


@pytest.mark.parametrize(("objectives", "divisions"), [(1, 1), (2, 4), (3, 3), (4, 1), (5, 2)])
def test_the_lattice_is_whole(objectives: int, divisions: int) -> None:
    weights = np.array(lattice(objectives, divisions))
    inner = divisions >= objectives
    assert len(weights) == math.comb(divisions + objectives - 1, objectives - 1) + (not inner)
    assert len(np.unique(weights, axis=0)) == len(weights)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert all((weights == corner).all(axis=1).any() for corner in np.eye(objectives))
    assert (weights > 0).all(axis=1).any()


def test_each_objective_alone_and_all_equally_the_study_s_first() -> None:
    assert len(CmaParEgo(box(3), 0).best()) == 3
    assert len(CmaParEgo(box(3), 0, divisions=4).best()) == 5
    skewed = CmaParEgo(replace(box(3), weights=np.array([0.9, 0.1])), 0)
    skewed.tell([TrialResult(None, np.zeros(3), np.zeros(2))])
    np.testing.assert_allclose(skewed._members[0]._score(np.array([1.0, 0.0])), 1.05)


def test_the_scalarisation_is_the_augmented_tchebycheff() -> None:
    """Knowles 2006, eq. 2, from the lowest loss seen and in units of the anchors' range."""
    problem = replace(
        box(3),
        scale=np.array([[1.0, 3.0], [0.0, 10.0]]),
        weights=np.array([0.25, 0.75]),
        anchors=(
            TrialResult(None, np.full(3, 0.1), np.array([0.5, 4.0])),
            TrialResult(None, np.full(3, 0.2), None),
        ),
    )
    strategy = CmaParEgo(problem, 0, divisions=4)
    suggestion = strategy.ask(1)[0]
    strategy.tell([TrialResult(suggestion.id, suggestion.point, np.array([2.0, -1.0]))])
    first = 0.25 * (1.7 - 0.5) / 2
    second = 0.75 * (3.0 + 1.0) / 10
    expected = max(first, second) + 0.05 * (first + second)
    assert strategy._members[0]._score(np.array([1.7, 3.0])) == pytest.approx(expected)


@pytest.mark.parametrize("weights", [[0.0, 1.0], [0.3, 0.7]])
def test_a_dominated_point_never_scores_better(weights: list[float]) -> None:
    rng = np.random.default_rng(0)
    strategy = CmaParEgo(box(2), 0)
    for _ in range(200):
        better = rng.standard_normal(2)
        strategy._see(TrialResult(None, np.zeros(2), better))
        worse = better + rng.random(2)
        scores = [strategy._tchebycheff(np.array(weights), losses) for losses in (better, worse)]
        assert scores[0] < scores[1]


def test_its_front_covers_more_than_random_points() -> None:
    for seed in range(2):
        tasks = make_problem("quadratic_tasks", 16, seed=seed)
        reference = np.max([tasks.losses(point) for point in tasks.pareto_set(0)], axis=0) * 1.1
        scale = np.stack([np.zeros(2), reference], axis=1)
        problem = replace(box(16, budget=400), scale=scale)
        volumes = [
            hypervolume(search(strategy, tasks.losses, 400, seed=seed) / reference, np.ones(2))
            for strategy in (CmaParEgo(problem, seed), Sobol(problem, seed))
        ]
        whole = hypervolume(
            [tasks.losses(point) / reference for point in tasks.pareto_set(100)], np.ones(2)
        )
        assert volumes[0] > 0.5 * whole
        assert volumes[0] > volumes[1] + 0.15 * whole


def test_each_objective_s_optimum_and_a_trade_off_are_recommended() -> None:
    tasks = make_problem("quadratic_tasks", 4, seed=1)
    strategy = CmaParEgo(box(4, budget=1000), 0)
    search(strategy, tasks.losses, 1000)
    means = np.array(strategy.best())
    for task, optimum in enumerate(tasks.pareto_set(0)):
        assert min(np.linalg.norm(means - optimum, axis=1)) < 0.03, task
    losses = tasks.losses(means[0])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.1)


def test_the_middle_of_a_concave_front_is_found() -> None:
    """Fonseca and Fleming 1995: no weighted sum has its minimum there."""

    def losses(x: np.ndarray) -> np.ndarray:
        away = 4 * (x - 0.5)
        return np.array(
            [1 - np.exp(-np.sum((away - 1) ** 2)), 1 - np.exp(-np.sum((away + 1) ** 2))]
        )

    sums = CmaEs(box(2, start=0.45), 0)
    tchebycheff = CmaParEgo(box(2, start=0.45), 0)
    search(sums, losses, 300)
    search(tchebycheff, losses, 600)
    assert abs(np.subtract(*losses(sums.best()[0]))) > 0.9
    middle = losses(tchebycheff.best()[0])
    np.testing.assert_allclose(middle, 1 - np.exp(-2), atol=0.02)


def test_with_one_objective_it_is_cma_es() -> None:
    strategy = CmaParEgo(box(5, objectives=1), 0)
    alone = CmaEs(box(5, objectives=1), int(np.random.default_rng(0).integers(2**32, size=1)[0]))
    for one in (strategy, alone):
        search(one, lambda x: np.array([np.sum((x - 0.3) ** 2)]), 200)
    assert np.array_equal(strategy.best(), alone.best())


def test_failures_and_parts_of_the_items_move_no_bound() -> None:
    strategy = CmaParEgo(box(3), 0)
    before = strategy._ideal.copy()
    strategy.tell(
        [
            TrialResult(None, np.zeros(3), None),
            TrialResult(None, np.zeros(3), np.full(2, -9.0), evaluated=2),
        ]
    )
    assert np.array_equal(strategy._ideal, before)
