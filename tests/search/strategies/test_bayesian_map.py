"""Bayesian MAP beyond the contract: rays, bins, and a design that goes where the models err."""

from __future__ import annotations

import numpy as np
import pytest

from mergesearch.evaluators.synthetic_problems import make_problem
from mergesearch.merging import InputError
from mergesearch.search.front import hypervolume
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.bayesian_map import (
    BayesianMap,
    Rays,
    bin_scores,
    to_angles,
    to_direction,
)


def box(
    dim: int, objectives: int = 2, *, budget: int = 80, low: float = 0.0, high: float = 1.0, **facts
) -> Problem:
    return Problem(
        np.full(dim, low),
        np.full(dim, high),
        np.full(dim, 0.5 * (low + high)),
        objectives,
        budget,
        np.tile([0.0, 1.0], (objectives, 1)),
        np.full(objectives, 1 / objectives),
        **facts,
    )


def drive(strategy, function, trials: int, in_flight: int = 4) -> np.ndarray:
    """Results in another order than asked; the points in the order in which they were asked."""
    rng = np.random.default_rng(0)
    outstanding = []
    points = []
    done = 0
    while done < trials:
        while len(outstanding) < in_flight and len(points) < trials:
            outstanding += strategy.ask(1)
            points.append(outstanding[-1].point)
        result = outstanding.pop(int(rng.integers(len(outstanding))))
        strategy.tell([TrialResult(result.id, result.point, function(result.point))])
        done += 1
    return np.array(points)


# --- rays and bins
# ----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_angles_and_directions_are_inverse(dim: int) -> None:
    angles = np.random.default_rng(dim).uniform(0, np.pi / 2, (20, dim - 1))
    directions = np.array([to_direction(row) for row in angles])
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0)
    np.testing.assert_allclose(to_angles(3.0 * directions), angles, atol=1e-12)


def test_a_direction_in_three_dimensions_by_hand() -> None:
    a = 0.3
    b = 1.1
    np.testing.assert_allclose(
        to_direction(np.array([a, b])), [np.cos(a), np.sin(a) * np.cos(b), np.sin(a) * np.sin(b)]
    )


@pytest.mark.parametrize(("dim", "bins"), [(1, 1), (2, 4), (3, 16), (4, 8), (6, 32)])
def test_samples_lie_in_their_bin_and_short_of_the_face(dim: int, bins: int) -> None:
    rays = Rays(np.zeros(dim), np.ones(dim))
    rng = np.random.default_rng(0)
    assert rays.bins == bins
    for number in range(bins):
        points = np.array([rays.sample(number, rng) for _ in range(10)])
        assert np.all(rays.bins_of(points) == number)
        assert np.all((points.max(axis=1) >= 0.2 - 1e-12) & (points.max(axis=1) <= 0.8 + 1e-12))


@pytest.mark.parametrize(
    ("low", "high", "origin"),
    [(0.0, 1.0, 0.0), (-0.5, 1.5, 0.25), (0.8, 1.3, 0.0), (-2.0, -1.0, 1.0)],
)
def test_rays_begin_at_no_coefficients_or_the_nearest_corner(
    low: float, high: float, origin: float
) -> None:
    problem = box(2, low=low, high=high)
    strategy = BayesianMap(problem, 0, initial=60)
    units = (np.array([s.point for s in strategy.ask(60)]) - low) / (high - low)
    rays = units[3:]  # after the start and the vertices
    offsets = np.abs(rays - origin) / max(origin, 1 - origin)
    assert np.all((offsets.max(axis=1) >= 0.2 - 1e-9) & (offsets.max(axis=1) <= 0.8 + 1e-9))
    assert np.all(rays >= origin - 1e-12) or np.all(rays <= origin + 1e-12)


def test_a_bins_score_is_its_mean_plus_half_its_spread_over_subsamples() -> None:
    rng = np.random.default_rng(0)
    squares = rng.exponential(size=400)
    bins = np.repeat([0, 2], 200)
    scores = bin_scores(squares * np.repeat([1.0, 3.0], 200), bins, 4, rng)
    spread = [
        np.std(own) * np.sqrt(0.2 / 160) for own in np.split(squares, 2)
    ]  # of means of 160 out of 200
    expected = [np.mean(own) + 0.5 * s for own, s in zip(np.split(squares, 2), spread, strict=True)]
    assert scores[0] / scores[2] == pytest.approx(expected[0] / (3 * expected[1]), rel=0.02)


def test_bins_without_points_count_as_the_worst() -> None:
    scores = bin_scores(np.array([1.0, 4.0]), np.array([0, 1]), 4, np.random.default_rng(0))
    assert scores[0] < scores[1] == scores[2] == scores[3] == 1.0
    assert np.all(
        bin_scores(np.zeros(3), np.zeros(3, dtype=int), 2, np.random.default_rng(0)) == 1.0
    )


# --- the strategy
# ----------------------------------------------------------------------------


def where_they_go(rough: int) -> np.ndarray:
    """Share of the later rounds of the design in each of the four bins.

    One bin is rough for the first objective.
    """
    rays = Rays(np.zeros(2), np.ones(2))
    counts = np.zeros(4)

    def losses(x: np.ndarray) -> np.ndarray:
        noise = np.sin(60 * x[0]) * np.cos(50 * x[1]) if rays.bins_of(x[None])[0] == rough else 0.0
        return np.array([x.sum() + noise, x[0] - x[1]])

    for seed in range(4):
        points = drive(BayesianMap(box(2), seed, initial=16, share=0.75, rounds=6), losses, 60)
        counts += np.bincount(rays.bins_of(points[16:]), minlength=4)
    return counts / counts.sum()


def test_the_design_goes_where_a_model_errs() -> None:
    shares = [where_they_go(rough)[rough] for rough in (0, 3)]
    assert min(shares) > 0.4


def test_bins_are_tried_even_where_nothing_was_measured() -> None:
    """Anchors in one bin alone: the other fifteen are not left out."""
    anchors = tuple(
        TrialResult(None, np.array([0.1, 0.02 * step, 0.01]), np.full(2, 0.1 * step))
        for step in range(1, 5)
    )
    visited = []
    for seed in range(3):
        strategy = BayesianMap(box(3, anchors=anchors), seed, initial=1, rounds=10)
        points = drive(strategy, lambda x: np.array([x.sum(), x[0]]), 40)
        visited.append(len(set(Rays(np.zeros(3), np.ones(3)).bins_of(points))))
    assert min(visited) >= 12


def test_the_design_ends_at_its_share_of_the_budget() -> None:
    strategy = BayesianMap(box(3, budget=60), 0, share=0.5, rounds=3)
    rays = Rays(np.zeros(3), np.ones(3))
    inside = []
    for number in range(60):
        suggestion = strategy.ask(1)[0]
        inside.append((number, len(strategy._queue)))
        strategy.tell(
            [
                TrialResult(
                    suggestion.id,
                    suggestion.point,
                    np.array([np.sum(suggestion.point), suggestion.point[0]]),
                )
            ]
        )
    assert rays.bins == 16
    assert strategy._later == 0
    assert all(left == 0 for number, left in inside if number >= 29)


@pytest.mark.parametrize("name", ["quadratic_tasks", "zdt1"])
def test_covers_the_front(name: str) -> None:
    made = make_problem(name, 3, seed=1)
    optimal = np.array([made.losses(x) for x in made.pareto_set(300)])
    low = optimal.min(axis=0)
    high = optimal.max(axis=0)
    points = drive(BayesianMap(box(3, budget=120), 0), made.losses, 120)
    reached = np.array([made.losses(x) for x in points])
    volumes = [hypervolume((rows - low) / (high - low), [1.1, 1.1]) for rows in (reached, optimal)]
    assert volumes[0] > 0.97 * volumes[1]


def test_preferences_move_along_the_front() -> None:
    made = make_problem("quadratic_tasks", 3, seed=0)
    strategy = BayesianMap(box(3), 0)
    drive(strategy, made.losses, 80)
    reached = np.array(
        [made.losses(strategy.query([share, 1 - share])) for share in np.linspace(0, 1, 7)]
    )
    assert np.all(np.diff(reached[:, 0]) <= 1e-2)
    assert reached[0, 0] > 2 * reached[-1, 0]


def test_a_fixed_coordinate_changes_nothing_for_the_others() -> None:
    free = BayesianMap(box(2), 0)
    problem = box(3)
    fixed = BayesianMap(
        Problem(
            problem.lower,
            np.array([1.0, 0.0, 1.0]),
            np.array([0.5, 0.0, 0.5]),
            2,
            80,
            problem.scale,
            problem.weights,
        ),
        0,
    )
    for _ in range(30):
        a = free.ask(1)[0]
        b = fixed.ask(1)[0]
        np.testing.assert_allclose(a.point, b.point[[0, 2]], atol=1e-12)
        losses = np.array([np.sum(a.point**2), np.sum((a.point - 1) ** 2)])
        free.tell([TrialResult(a.id, a.point, losses)])
        fixed.tell([TrialResult(b.id, b.point, losses)])


def test_too_many_coordinates_are_refused() -> None:
    with pytest.raises(InputError, match="at most 8 coordinates for bayesian_map, received 9"):
        BayesianMap(box(9), 0)
