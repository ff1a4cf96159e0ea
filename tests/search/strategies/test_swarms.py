"""PSO-Merging and Model Swarms beyond the contract: update rules, turns, restarts, failures."""

from __future__ import annotations

import numpy as np
import pytest

from mergesearch.evaluators.synthetic_problems import make_problem
from mergesearch.search.strategies.base import TrialResult
from tests.search.strategies.populations import anchor, asked, box, make, run, sphere

NAMES = ["pso", "model_swarms"]


def known(dim: int, count: int) -> tuple[TrialResult, ...]:
    """Anchors inside the box, best first, away from each other."""
    points = np.random.default_rng(11).uniform(0.2, 0.8, (count, dim))
    return tuple(
        anchor(point, sphere) for point in sorted(points, key=lambda point: float(sphere(point)[0]))
    )


def test_pso_follows_its_formula_move_by_move() -> None:
    """A plain implementation with the same draws gives the same points.

    It takes one particle after another.
    """
    dim = 4
    anchors = known(4, 3)
    moves = asked(make("pso", box(dim, anchors=anchors), 5, particles=3), sphere, 30)

    rng = np.random.default_rng(5)
    x = np.array([one.point for one in anchors])
    v = np.zeros_like(x)
    p = x.copy()
    f = np.array([one.losses[0] for one in anchors])
    for move in range(30):
        i = move % 3
        (r1, r2) = rng.random((2, dim))
        v[i] = 0.2 * v[i] + 2 * r1 * (p[i] - x[i]) + 2 * r2 * (p[f.argmin()] - x[i])
        inside = (x[i] + v[i] >= 0) & (x[i] + v[i] <= 1)
        x[i] = np.clip(x[i] + v[i], 0, 1)
        v[i] = np.where(inside, v[i], 0)
        if sphere(x[i])[0] < f[i]:
            p[i] = x[i]
            f[i] = sphere(x[i])[0]
        np.testing.assert_allclose(moves[move], x[i], atol=1e-12)


def test_model_swarms_follows_its_formula_move_by_move() -> None:
    dim = 4
    anchors = known(4, 3)
    moves = asked(
        make("model_swarms", box(dim, anchors=anchors), 5, particles=3, patience=4), sphere, 60
    )

    rng = np.random.default_rng(5)
    x = np.array([one.point for one in anchors])
    v = x[rng.integers(3, size=3)] - x
    p = x.copy()
    f = np.array([one.losses[0] for one in anchors])
    stands = x.copy()
    now = f.copy()
    idle = np.zeros(3)
    restarts = 0
    for move in range(60):
        i = move % 3
        if idle[i] >= 4:
            x[i] = p[i]
            v[i] = 0
            idle[i] = 0
            restarts = restarts + 1
        rv, rp, rg, rw = rng.random((4, dim))
        total = 0.4 * rv + 0.3 * rp + 0.3 * rg + 0.3 * rw
        best = p[f.argmin()]
        worst = stands[now.argmax()]
        pull = (
            0.4 * rv * v[i]
            + 0.3 * rp * (p[i] - x[i])
            + 0.3 * rg * (best - x[i])
            - 0.3 * rw * (worst - x[i])
        )
        v[i] = pull / total
        x[i] = np.clip(x[i] + max(0.95 ** (move // 3), 0.1) * v[i], 0, 1)
        stands[i] = x[i]
        now[i] = sphere(x[i])[0]
        idle[i] = idle[i] + 1
        if now[i] < f[i]:
            p[i] = x[i]
            f[i] = now[i]
            idle[i] = 0
        np.testing.assert_allclose(moves[move], x[i], atol=1e-12)
    assert restarts > 0


@pytest.mark.parametrize(("in_flight", "reached"), [(1, 1e-8), (16, 1e-6)])
def test_pso_converges_on_the_sphere_in_ten_dimensions(in_flight: int, reached: float) -> None:
    """The loss at the start is 0.9."""
    for seed in range(3):
        assert run(make("pso", box(10), seed), sphere, 2000, in_flight).min() < reached


def test_model_swarms_approaches_the_sphere_in_ten_dimensions() -> None:
    """The push from the worst keeps the swarm wide: it comes near and no nearer."""
    reached = [run(make("model_swarms", box(10), seed), sphere, 2000).min() for seed in range(3)]
    assert max(reached) < 0.2


@pytest.mark.parametrize("in_flight", [1, 16])
@pytest.mark.parametrize("name", NAMES)
def test_better_than_random_on_quadratic_tasks(name: str, in_flight: int) -> None:
    """The excess loss that is left after 400 trials on two weighted tasks.

    Twelve seeds: Model Swarms halves what random leaves, and a seed's ratio varies by a factor of
    two.
    """
    left = {name: [], "sobol": []}
    for seed in range(12):
        problem = make_problem("quadratic_tasks", 8, objectives=2, seed=seed)
        least = problem.losses(problem.tradeoff(np.array([0.5, 0.5]))).mean()
        for strategy, values in left.items():
            losses = run(make(strategy, box(8, 2), seed), problem.losses, 400, in_flight, seed)
            values.append(np.log(losses.mean(axis=1).min() - least))
    assert np.mean(left[name]) < np.mean(left["sobol"]) + np.log(0.8)


@pytest.mark.parametrize("name", NAMES)
def test_only_ranks_matter(name: str) -> None:
    plain = asked(make(name, box(5), 4), sphere, 150)
    warped = asked(make(name, box(5), 4), lambda point: np.exp(7 * sphere(point)), 150)
    assert np.array_equal(plain, warped)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_points(name: str) -> None:
    first, again, other = (asked(make(name, box(5), seed), sphere, 80) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_known_merges_are_particles_that_need_no_measurement(name: str) -> None:
    anchors = known(6, 4)
    points = asked(make(name, box(6, anchors=anchors)), sphere, 60)
    for one in anchors:
        assert not np.any(np.all(points == one.point, axis=1))
    if name == "pso":
        np.testing.assert_array_equal(
            points[0], np.full(6, 0.3)
        )  # the start, then midpoints of the anchors
        np.testing.assert_allclose(points[1], 0.5 * (anchors[0].point + anchors[1].point))


def test_first_particles_of_model_swarms_mix_two_known_merges_and_go_past_them() -> None:
    one = anchor([0.4, 0.4, 0.4], sphere)
    other = anchor([0.5, 0.5, 0.5], sphere)
    strategy = make("model_swarms", box(3, anchors=(one, other)), particles=42)
    mixed = np.array([suggestion.point for suggestion in strategy.ask(20)])
    np.testing.assert_allclose(np.ptp(mixed, axis=1), 0, atol=1e-12)  # on the line through both
    assert 0.3 <= mixed.min() < 0.4
    assert 0.5 < mixed.max() <= 0.6


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_result_can_become_the_swarms_best_place(name: str) -> None:
    """Particles without pulls of their own end at the best point of others."""
    options = {"cognitive": 0.0, "inertia": 1e-6, "particles": 5} | (
        {"repel": 0.0} if name == "model_swarms" else {}
    )
    strategy = make(name, box(3), **options)
    foreign = TrialResult(None, np.array([0.9, 0.1, 0.8]), np.array([-1.0]))
    strategy.tell([foreign])
    points = asked(strategy, sphere, 400)
    np.testing.assert_allclose(points[-1], foreign.point, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_an_estimate_leads_only_after_a_measurement_on_all_items(name: str) -> None:
    strategy = make(name, box(4, anchors=known(4, 3)))
    before = strategy._lead.copy()  # type: ignore[attr-defined]
    first = strategy.ask(1)[0]
    strategy.tell([TrialResult(first.id, first.point, np.array([-5.0]), estimated=7)])
    assert np.array_equal(strategy._lead, before)  # type: ignore[attr-defined]
    again, other = strategy.ask(2)
    assert np.array_equal(again.point, first.point)
    assert not np.array_equal(other.point, first.point)
    strategy.tell([TrialResult(again.id, again.point, np.array([-4.0]))])
    assert np.array_equal(strategy._lead, first.point)  # type: ignore[attr-defined]


def test_model_swarms_flees_from_a_failure() -> None:
    """A failure is the worst point, which steps lead straight away from.

    Nothing else is at work here.
    """
    anchors = known(3, 3)
    strategy = make(
        "model_swarms",
        box(3, anchors=anchors),
        particles=3,
        inertia=1e-9,
        cognitive=0.0,
        social=0.0,
    )
    bad = strategy.ask(1)[0]
    strategy.tell([TrialResult(bad.id, bad.point, None)])
    moved = strategy.ask(1)[0].point
    origin = anchors[1].point
    np.testing.assert_allclose(moved, np.clip(origin + (origin - bad.point), 0, 1), atol=1e-6)


def test_a_failure_is_no_place_to_return_to() -> None:
    strategy = make("pso", box(3), particles=2)
    first, second = strategy.ask(2)
    strategy.tell(
        [
            TrialResult(first.id, first.point, None),
            TrialResult(second.id, second.point, np.array([1.0])),
        ]
    )
    assert strategy._particles[0].loss == np.inf
    np.testing.assert_allclose(strategy._lead, second.point)
    third = strategy.ask(1)[0]
    strategy.tell([TrialResult(third.id, third.point, np.array([5.0]))])
    np.testing.assert_allclose(strategy._particles[0].best, third.point)


@pytest.mark.parametrize("name", NAMES)
def test_more_suggestions_than_particles_are_given_without_waiting(name: str) -> None:
    suggestions = make(name, box(4), particles=3).ask(20)
    assert len(suggestions) == 20
    assert np.all(np.isfinite([suggestion.point for suggestion in suggestions]))
