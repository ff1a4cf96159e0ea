"""EvoGM-style search beyond the contract: the step, what is promoted, convergence, failures."""

from __future__ import annotations

import numpy as np
import pytest

from mergesearch.evaluators.synthetic_problems import make_problem
from mergesearch.search.strategies.base import TrialResult
from mergesearch.search.strategies.evogm import step
from tests.search.strategies.populations import anchor, asked, box, make, run, sphere


def test_a_step_leads_from_loser_to_winner_and_past_it() -> None:
    loser = np.array([-0.5, 0.2, 0.9, 0.3])
    winner = np.array([0.5, 0.2, -0.9, 0.4])
    shares = np.random.default_rng(3).uniform(0, 2, 4)
    expected = np.clip(loser + shares * (winner - loser), -1, 1)
    np.testing.assert_allclose(step(loser, winner, np.random.default_rng(3)), expected)
    rng = np.random.default_rng(0)
    steps = np.array([step(loser, winner, rng) for _ in range(4000)])
    np.testing.assert_allclose(
        steps.mean(axis=0)[[1, 3]], winner[[1, 3]], atol=0.01
    )  # on average, the winner
    assert np.abs(steps).max() == 1.0


def test_first_merges_are_combinations_of_known_ones() -> None:
    """With as many known merges as directions, no point leaves their span.

    Points are ``start + λ (known - start)``.
    """
    anchors = tuple(
        anchor(point, sphere) for point in np.random.default_rng(1).uniform(0.4, 0.6, (2, 5))
    )
    strategy = make("evogm", box(5, start=0.5, anchors=anchors), directions=2)
    points = np.array([suggestion.point for suggestion in strategy.ask(5)])
    np.testing.assert_array_equal(points[0], np.full(5, 0.5))
    known = np.array([one.point - 0.5 for one in anchors])
    shares, *_ = np.linalg.lstsq(known.T, (points - 0.5).T, rcond=None)
    np.testing.assert_allclose(known.T @ shares, (points - 0.5).T, atol=1e-12)
    assert np.abs(shares).max() <= 1 + 1e-9


def test_the_best_merges_of_a_round_are_directions_of_the_next() -> None:
    strategy = make("evogm", box(6), directions=4)
    points = asked(strategy, sphere, 16)  # one round: 2 K and 2 K more
    assert strategy._round.number == 1
    ranked = points[np.argsort([sphere(point)[0] for point in points])]
    np.testing.assert_array_equal(strategy._round.origin, ranked[0])
    np.testing.assert_allclose(strategy._round.directions[:2], ranked[1:3] - ranked[0])
    length = np.sqrt(np.mean((ranked[1:3] - ranked[0]) ** 2))
    fresh = strategy._round.directions[2:]
    assert 0.3 * length < np.sqrt(np.mean(fresh**2)) < 3 * length


def test_late_results_are_promoted_but_do_not_count_for_the_next_round() -> None:
    strategy = make("evogm", box(6), directions=2)
    late = strategy.ask(1)[0]
    asked(strategy, sphere, 8)
    assert strategy._round.number == 1
    due = strategy._due
    strategy.tell([TrialResult(late.id, late.point, np.array([-1.0]))])
    assert strategy._due == due
    asked(strategy, sphere, 8)
    assert strategy._round.number == 2
    np.testing.assert_array_equal(strategy._round.origin, late.point)


def test_failures_are_losers_and_never_promoted() -> None:
    strategy = make("evogm", box(4), directions=2)
    failed = []
    for number in range(8):
        suggestion = strategy.ask(1)[0]
        losses = None if number % 4 else sphere(suggestion.point)
        failed += [suggestion.point] if losses is None else []
        strategy.tell([TrialResult(suggestion.id, suggestion.point, losses)])
    kept = [position for _, position in strategy._best.values()]
    assert len(kept) == 2  # room for three
    assert not any(np.array_equal(point, position) for point in failed for position in kept)


@pytest.mark.parametrize(("in_flight", "reached"), [(1, 1e-6), (16, 1e-4)])
def test_converges_on_the_sphere_in_ten_dimensions(in_flight: int, reached: float) -> None:
    """More coordinates than directions: fresh draws reach what promoted merges do not span."""
    for seed in range(3):
        assert run(make("evogm", box(10), seed), sphere, 2000, in_flight).min() < reached


@pytest.mark.parametrize("in_flight", [1, 16])
@pytest.mark.parametrize("dim", [8, 32])
def test_better_than_random_on_quadratic_tasks(dim: int, in_flight: int) -> None:
    left = {"evogm": [], "sobol": []}
    for seed in range(3):
        problem = make_problem("quadratic_tasks", dim, objectives=2, seed=seed)
        least = problem.losses(problem.tradeoff(np.array([0.5, 0.5]))).mean()
        for strategy, values in left.items():
            losses = run(make(strategy, box(dim, 2), seed), problem.losses, 400, in_flight, seed)
            values.append(np.log(losses.mean(axis=1).min() - least))
    assert np.mean(left["evogm"]) < np.mean(left["sobol"]) + np.log(0.8)


def test_only_ranks_matter() -> None:
    plain = asked(make("evogm", box(5), 4), sphere, 150)
    warped = asked(make("evogm", box(5), 4), lambda point: np.exp(7 * sphere(point)), 150)
    assert np.array_equal(plain, warped)


def test_same_seed_same_points() -> None:
    first, again, other = (asked(make("evogm", box(5), seed), sphere, 80) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
