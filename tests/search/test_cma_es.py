"""CMA-ES beyond the contract: convergence, asynchrony, noise, invariance, options."""

from __future__ import annotations

import numpy as np
import pytest

from merging import InputError
from search.strategies import build_strategy, check_options
from search.strategies.cma_es import CmaEs, default_population
from search.strategy import Problem, Told


def box(dim: int, *, low: float = 0.0, high: float = 1.0, start: float = 0.3) -> Problem:
    return Problem(
        np.full(dim, low), np.full(dim, high), np.full(dim, start), 1, 5000, np.array([[0.0, 1.0]]), np.array([1.0])
    )


def ellipsoid(dim: int, condition: float, seed: int):
    """A rotated ellipsoid with its minimum 0 inside the unit box."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    scales = condition ** np.linspace(0, 1, dim)
    optimum = rng.uniform(0.35, 0.65, dim)
    return (lambda x: float(np.sum(scales * (rotation @ (x - optimum)) ** 2))), optimum


def minimise(strategy, function, trials: int, in_flight: int = 1, seed: int = 0) -> None:
    rng, outstanding = np.random.default_rng(seed), []
    for _ in range(trials):
        while len(outstanding) < in_flight:
            outstanding += strategy.ask(1)
        done = outstanding.pop(int(rng.integers(len(outstanding))))
        strategy.tell([Told(done.id, done.point, np.array([function(done.point)]))])


def test_sphere_in_ten_dimensions_to_1e8() -> None:
    strategy = CmaEs(box(10), 0)
    minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)), 2000)
    assert np.sum((strategy.best()[0] - 0.6) ** 2) < 1e-8


def test_rotated_ellipsoid_to_1e8() -> None:
    function, _ = ellipsoid(10, 1e3, seed=1)
    strategy = CmaEs(box(10), 0)
    minimise(strategy, function, 4500)
    assert function(strategy.best()[0]) < 1e-8


@pytest.mark.parametrize(("in_flight", "shrinks_to"), [(8, 1e-8), (32, 1e-2)])
def test_converges_with_many_results_outstanding(in_flight: int, shrinks_to: float) -> None:
    """No generation barrier: stale results (with 32, three populations old) are used, and the mean closes in."""
    ratios = []
    for seed in range(5):
        function, _ = ellipsoid(8, 30.0, seed)
        strategy = CmaEs(box(8), seed)
        minimise(strategy, function, 1500, in_flight=in_flight)
        ratios.append(function(strategy.best()[0]) / function(np.full(8, 0.3)))
    assert np.exp(np.mean(np.log(ratios))) < shrinks_to


def test_the_mean_beats_the_luckiest_trial_under_noise() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        strategy = CmaEs(box(32), seed)
        seen: list[tuple[float, float]] = []

        def noisy(x, rng=rng, seen=seen) -> float:
            true = float(np.sum((x - 0.55) ** 2))
            seen.append((true + 0.1 * rng.standard_normal(), true))
            return seen[-1][0]

        minimise(strategy, noisy, 400)
        assert float(np.sum((strategy.best()[0] - 0.55) ** 2)) < min(seen)[1]


def test_an_optimum_on_the_bounds_is_reached() -> None:
    strategy = CmaEs(box(6, start=0.5), 0)
    minimise(strategy, lambda x: float(np.sum(x)), 1200)
    assert np.all(strategy.best()[0] < 1e-3)


def test_only_ranks_matter() -> None:
    """Invariance: a strictly increasing transformation of the losses changes nothing."""
    plain, warped = CmaEs(box(5), 4), CmaEs(box(5), 4)
    minimise(plain, lambda x: float(np.sum((x - 0.4) ** 2)), 200)
    minimise(warped, lambda x: float(np.exp(7 * np.sum((x - 0.4) ** 2))), 200)
    assert np.array_equal(plain.best()[0], warped.best()[0])


def test_translation_of_the_box_is_translation_of_the_points() -> None:
    here, there = CmaEs(box(3), 1), CmaEs(box(3, low=10.0, high=14.0, start=10.0 + 4 * 0.3), 1)
    for _ in range(20):
        a, b = here.ask(1)[0], there.ask(1)[0]
        np.testing.assert_allclose(10.0 + 4 * a.point, b.point, atol=1e-12)
        for strategy, suggestion in ((here, a), (there, b)):
            strategy.tell([Told(suggestion.id, suggestion.point, np.array([float(np.sum(a.point**2))]))])


def test_a_foreign_point_is_the_one_learnt_from() -> None:
    """A log continued from the record tells points that this strategy did not draw."""
    own, foreign = CmaEs(box(4), 2), CmaEs(box(4), 2)
    for _ in range(16):
        a, b = own.ask(1)[0], foreign.ask(1)[0]
        own.tell([Told(a.id, a.point, np.array([float(np.sum(a.point))]))])
        point = np.full(4, 0.9)
        foreign.tell([Told(b.id, point, np.array([float(np.sum(b.point))]))])
    assert np.all(foreign.best()[0] > own.best()[0])


def test_population_and_covariance_rules() -> None:
    assert [default_population(d) for d in (1, 10, 200, 256, 257, 2000)] == [4, 10, 19, 20, 32, 32]
    wide = CmaEs(box(300), 0)
    assert wide._engine.sm.__class__.__name__ == CmaEs(box(5), 0, covariance="separable")._engine.sm.__class__.__name__
    assert CmaEs(box(5), 0)._engine.sm.__class__ is not wide._engine.sm.__class__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigm": 0.1}, "strategy.sigm: unknown option of cma_es; known: ['covariance', 'population', 'sigma']"),
        ({"sigma": -1}, "strategy.sigma: Input should be greater than 0, received -1"),
        ({"population": 2}, "strategy.population: Input should be greater than or equal to 4, received 2"),
        ({"covariance": "ful"}, "strategy.covariance: Input should be 'auto', 'full' or 'separable', received 'ful'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_options("cma_es", options)
    assert str(error.value) == message


def test_an_unknown_strategy_names_the_closest() -> None:
    with pytest.raises(InputError, match="did you mean 'cma_es'"):
        build_strategy("cma-es", {}, box(2), 0)
