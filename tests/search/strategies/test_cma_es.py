"""CMA-ES beyond the contract: convergence, asynchrony, noise, invariance, options."""

from __future__ import annotations

import inspect
import textwrap

import numpy as np
import pytest

from mergesearch.evaluators.synthetic_problems import make_problem
from mergesearch.merging import InputError
from mergesearch.search.strategies import cma_es
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.cma_es import CmaEs, default_population
from mergesearch.search.strategies.parts.cma_engine import Engine
from mergesearch.search.strategies.parts.noise import fall, pooled, settled
from mergesearch.search.strategies.table import build_strategy, check_options


def box(dim: int, *, low: float = 0.0, high: float = 1.0, start: float = 0.3) -> Problem:
    return Problem(
        np.full(dim, low),
        np.full(dim, high),
        np.full(dim, start),
        1,
        5000,
        np.array([[0.0, 1.0]]),
        np.array([1.0]),
    )


def ellipsoid(dim: int, condition: float, seed: int):
    """A rotated ellipsoid with its minimum 0 inside the unit box."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    scales = condition ** np.linspace(0, 1, dim)
    optimum = rng.uniform(0.35, 0.65, dim)
    return (lambda x: float(np.sum(scales * (rotation @ (x - optimum)) ** 2))), optimum


def minimise(
    strategy, function, trials: int, in_flight: int = 1, seed: int = 0, error: float | None = None
) -> None:
    errors = None if error is None else np.array([error])
    rng = np.random.default_rng(seed)
    outstanding = []
    for _ in range(trials):
        while len(outstanding) < in_flight:
            outstanding += strategy.ask(1)
        done = outstanding.pop(int(rng.integers(len(outstanding))))
        losses = np.array([function(done.point)])
        strategy.tell([TrialResult(done.id, done.point, losses, errors=errors)])


def test_the_program_of_the_module_docstring_finds_the_minimum() -> None:
    documentation = inspect.getdoc(cma_es)
    assert documentation is not None
    program = documentation.partition("::\n\n")[2].partition("\n\n")[0]
    names = dict(vars(cma_es))
    exec(textwrap.dedent(program), names)  # the text under test
    np.testing.assert_allclose(names["strategy"].best()[0], 0.25, rtol=0, atol=1e-3)


def test_sphere_in_ten_dimensions_to_1e8() -> None:
    strategy = CmaEs(box(10), 0)
    minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)), 2000)
    assert np.sum((strategy.best()[0] - 0.6) ** 2) < 1e-8


def test_rotated_ellipsoid_to_1e8() -> None:
    function, _ = ellipsoid(10, 1e3, seed=1)
    strategy = CmaEs(box(10), 0)
    minimise(strategy, function, 4500)
    assert function(strategy.best()[0]) < 1e-8


@pytest.mark.parametrize(
    ("in_flight", "shrinks_to"), [pytest.param(8, 1e-8, marks=pytest.mark.slow), (32, 1e-2)]
)
def test_converges_with_many_results_outstanding(in_flight: int, shrinks_to: float) -> None:
    """No generation barrier: stale results are used, and the mean converges.

    With 32 outstanding they are three populations old.
    """
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
    plain = CmaEs(box(5), 4)
    warped = CmaEs(box(5), 4)
    minimise(plain, lambda x: float(np.sum((x - 0.4) ** 2)), 200)
    minimise(warped, lambda x: float(np.exp(7 * np.sum((x - 0.4) ** 2))), 200)
    assert np.array_equal(plain.best()[0], warped.best()[0])


def test_translation_of_the_box_is_translation_of_the_points() -> None:
    here = CmaEs(box(3), 1)
    there = CmaEs(box(3, low=10.0, high=14.0, start=10.0 + 4 * 0.3), 1)
    for _ in range(20):
        a = here.ask(1)[0]
        b = there.ask(1)[0]
        np.testing.assert_allclose(10.0 + 4 * a.point, b.point, atol=1e-12)
        for strategy, suggestion in ((here, a), (there, b)):
            strategy.tell(
                [
                    TrialResult(
                        suggestion.id, suggestion.point, np.array([float(np.sum(a.point**2))])
                    )
                ]
            )


def test_a_foreign_point_is_the_one_learnt_from() -> None:
    """A log continued from the record tells points that this strategy did not draw."""
    own = CmaEs(box(4), 2)
    foreign = CmaEs(box(4), 2)
    for _ in range(16):
        a = own.ask(1)[0]
        b = foreign.ask(1)[0]
        own.tell([TrialResult(a.id, a.point, np.array([float(np.sum(a.point))]))])
        point = np.full(4, 0.9)
        foreign.tell([TrialResult(b.id, point, np.array([float(np.sum(b.point))]))])
    assert np.all(foreign.best()[0] > own.best()[0])


def test_whole_populations_give_what_pycma_gives() -> None:
    """Reference: pycma by itself, in the same unbounded coordinates and with the same numbers."""
    import cma

    def losses(samples) -> list[float]:
        return [float(np.sum(np.arange(1, 6) * np.square(sample - 0.4))) for sample in samples]

    rng = np.random.default_rng(3)
    options = {
        "popsize": 8,
        "CMA_mirrors": 0,
        "seed": np.nan,
        "verbose": -9,
        "randn": lambda *s: rng.standard_normal(s),
    }
    theirs = cma.CMAEvolutionStrategy(np.full(5, 0.3), 0.15, options)
    ours = Engine(np.full(5, 0.3), 0.15, 8, False, np.random.default_rng(3))
    for _ in range(12):
        samples = theirs.ask()
        theirs.tell(samples, losses(samples))
        drawn = [ours.draw() for _ in range(8)]
        ours.update(drawn, losses(drawn))
    np.testing.assert_allclose(ours.mean, ours.unit_of(theirs.mean), rtol=1e-12)
    np.testing.assert_allclose(ours.spread, np.exp(np.mean(np.log(theirs.stds))), rtol=1e-12)


def test_coefficients_of_a_merge_task_are_found_in_600_evaluations() -> None:
    for seed in range(3):
        tasks = make_problem("quadratic_tasks", 8, objectives=3, seed=seed)
        weights = np.full(3, 1 / 3)
        problem = Problem(
            np.zeros(8), np.ones(8), np.full(8, 0.5), 3, 600, np.tile([0.0, 1.0], (3, 1)), weights
        )
        strategy = CmaEs(problem, seed)
        for _ in range(600):
            suggestion = strategy.ask(1)[0]
            strategy.tell(
                [TrialResult(suggestion.id, suggestion.point, tasks.losses(suggestion.point))]
            )
        assert np.linalg.norm(strategy.best()[0] - tasks.tradeoff(weights)) < 1e-2


def valleys(seed: int):
    """A bowl in two dimensions with many valleys, like Rastrigin's function.

    The lowest is 0 and lies away from the start.
    """
    optimum = np.random.default_rng(seed).uniform(0.55, 0.75, 2)

    def function(x) -> float:
        away = 6 * (x - optimum)
        return float(np.sum(away**2 / 6 + 1 - np.cos(2 * np.pi * away)))

    return function


def test_restarts_leave_valleys_that_a_single_run_is_caught_in() -> None:
    for seed in range(4):
        function = valleys(seed)
        single = CmaEs(box(2), seed, restarts=False, noise="off")
        several = CmaEs(box(2), seed, noise="off")
        minimise(single, function, 600)
        assert single._run.engine.stopped
        assert function(single.best()[0]) > 0.1
        for _ in range(25):
            if function(several.best()[0]) > 1e-6:
                minimise(several, function, 100)
        assert function(several.best()[0]) < 1e-6


def test_results_of_a_run_that_is_over_change_nothing() -> None:
    first = CmaEs(box(3), 0)
    second = CmaEs(box(3), 0)
    late = [strategy.ask(4) for strategy in (first, second)]
    for strategy in (first, second):
        population = strategy._run.engine.population
        minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)), 900)
        assert strategy._run.engine.population > population
    for strategy, suggestions, loss in ((first, late[0], -100.0), (second, late[1], 100.0)):
        strategy.tell([TrialResult(s.id, s.point, np.array([loss])) for s in suggestions])
        minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)), 50)
    assert np.array_equal(first.ask(1)[0].point, second.ask(1)[0].point)
    assert np.sum((first.best()[0] - 0.6) ** 2) < 1e-8


def test_after_a_restart_the_best_mean_is_still_recommended() -> None:
    strategy = CmaEs(box(3), 0)
    minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)), 400)
    while len(strategy._finished) == 0:
        minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)), 1)
    minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)), 30)
    assert np.sum((strategy._run.engine.mean - 0.6) ** 2) > 1e-4
    assert np.sum((strategy.best()[0] - 0.6) ** 2) < 1e-8


def test_under_noise_the_population_grows_and_the_mean_comes_closer() -> None:
    ratios = {}
    for noise in ("auto", "off"):
        shares = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            (function, _) = ellipsoid(8, 30.0, seed)
            start = function(np.full(8, 0.3))
            strategy = CmaEs(box(8), seed, noise=noise)
            sigma = 0.05 * start
            noisy = lambda x: function(x) + sigma * rng.standard_normal()  # noqa: B023, E731
            minimise(strategy, noisy, 1500, error=sigma)
            shares.append(function(strategy.best()[0]) / start)
            grown = strategy._run.engine.population >= 64
            assert grown if noise == "auto" else strategy._run.engine.population == 10
        ratios[noise] = np.exp(np.mean(np.log(shares)))
    assert ratios["auto"] < 0.5 * ratios["off"]


def test_the_population_grows_from_the_same_distribution() -> None:
    strategy = CmaEs(box(8), 0)
    minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)), 100)
    run = strategy._run
    before = (run.engine.mean, run.engine.spread, run.engine.population)
    run.grow()
    np.testing.assert_allclose(run.engine.mean, before[0], atol=1e-12)
    assert run.engine.spread == pytest.approx(before[1])
    assert run.engine.population == max(2 * before[2], 32)


def test_means_are_averaged_where_the_losses_no_longer_fall() -> None:
    assert settled([]) == 1
    assert settled(list(np.arange(40.0)[::-1])) == 1
    assert settled([*np.arange(40.0)[::-1], *[0.0] * 40]) == 28
    assert settled([0.0] * 7) == 1


def test_a_less_certain_loss_is_pulled_to_the_middle_of_its_batch() -> None:
    scores = np.array([0.0, 1.0, 2.0, 3.0, np.inf])
    equal = pooled(scores, np.array([0.3, 0.3, 0.3, 0.3, np.nan]))
    assert np.array_equal(equal, scores)
    nearly = pooled(scores, np.array([0.3, 0.4, 0.5, 0.31, np.nan]))
    assert np.array_equal(nearly, scores)
    unsure = pooled(scores, np.array([1.35, 0.1, 0.1, np.nan, np.nan]))
    # The spread is 1.25, as is the excess of the first error: half of the way to 1.5.
    np.testing.assert_allclose(unsure, [0.75, 1.0, 2.0, 3.0, np.inf])


def test_an_estimate_from_few_items_moves_the_mean_less() -> None:
    def after(errors: np.ndarray) -> np.ndarray:
        strategy = CmaEs(box(4), 0)
        for index, suggestion in enumerate(strategy.ask(default_population(4))):
            losses = np.array([-5.0 if index == 3 else suggestion.point.sum()])
            error = errors[1 if index == 3 else 0]
            strategy.tell(
                [TrialResult(suggestion.id, suggestion.point, losses, errors=np.array([error]))]
            )
        return strategy.best()[0]

    lucky = CmaEs(box(4), 0).ask(4)[3].point
    sure = np.linalg.norm(after(np.array([0.1, 0.1])) - lucky)
    unsure = np.linalg.norm(after(np.array([0.1, 30.0])) - lucky)
    assert sure < 0.9 * unsure


def test_without_noise_the_population_stays() -> None:
    strategy = CmaEs(box(8), 0, restarts=False)
    minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)), 800)
    assert strategy._run.engine.population == default_population(8)


def test_whether_losses_fall_is_the_rank_sum_test() -> None:
    from scipy.stats import mannwhitneyu

    levels = np.random.default_rng(0).standard_normal(16)
    statistic = mannwhitneyu(levels[:8], levels[8:], use_continuity=False, method="asymptotic")
    z = (statistic.statistic - 32) / np.sqrt(64 * 17 / 12)
    assert fall(list(levels)) == pytest.approx(z)
    assert fall([4.0, 3.0, 2.0, 1.0]) > 0
    assert fall([1.0] * 8) == 0


def neighbours(strategy: CmaEs, told: list[TrialResult]) -> np.ndarray:
    """Tell ``told`` amid a population of its own results; where it goes next."""
    for step in range(default_population(4)):
        suggestion = strategy.ask(1)[0]
        strategy.tell(
            [
                TrialResult(
                    suggestion.id, suggestion.point, np.array([float(np.sum(suggestion.point))])
                )
            ]
        )
        if step == 3:
            strategy.tell(told)
    return strategy.best()[0]


def test_good_results_of_others_pull_and_bad_ones_do_not() -> None:
    alone = neighbours(CmaEs(box(4), 0), [])
    there = np.full(4, 0.5)
    bad = neighbours(
        CmaEs(box(4), 0),
        [TrialResult(None, there, np.array([50.0])), TrialResult(None, there, None)],
    )
    good = neighbours(CmaEs(box(4), 0), [TrialResult(None, there, np.array([-50.0]))])
    assert np.array_equal(bad, alone)
    assert np.all(good > alone)


def test_results_from_some_of_the_items_are_passed_over() -> None:
    alone = neighbours(CmaEs(box(4), 0), [])
    part = neighbours(
        CmaEs(box(4), 0), [TrialResult(None, np.full(4, 0.5), np.array([-50.0]), evaluated=3)]
    )
    assert np.array_equal(part, alone)
    strategy = CmaEs(box(4), 0)
    for suggestion in strategy.ask(30):
        strategy.tell(
            [
                TrialResult(
                    suggestion.id,
                    suggestion.point,
                    np.array([float(np.sum(suggestion.point))]),
                    evaluated=3,
                )
            ]
        )
    np.testing.assert_allclose(strategy.best()[0], 0.3, atol=1e-12)


def test_off_in_a_study_file_is_off() -> None:
    assert check_options("cma_es", {"noise": False, "restarts": False})["noise"] == "off"


def test_population_and_covariance_rules() -> None:
    assert [default_population(d) for d in (1, 10, 200, 256, 257, 2000)] == [4, 10, 19, 20, 32, 32]
    wide = CmaEs(box(300), 0)
    assert (
        wide._run.engine._cma.sm.__class__.__name__
        == CmaEs(box(5), 0, covariance="separable")._run.engine._cma.sm.__class__.__name__
    )
    assert CmaEs(box(5), 0)._run.engine._cma.sm.__class__ is not wide._run.engine._cma.sm.__class__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sigm": 0.1},
            (
                "strategy.sigm: unknown option of cma_es; did you mean 'sigma'? known: "
                "covariance, noise, population, restarts, sigma"
            ),
        ),
        ({"sigma": -1}, "strategy.sigma: Input should be greater than 0, received -1"),
        (
            {"population": 2},
            "strategy.population: Input should be greater than or equal to 4, received 2",
        ),
        ({"noise": "on"}, "strategy.noise: Input should be 'auto' or 'off', received 'on'"),
        (
            {"covariance": "ful"},
            "strategy.covariance: Input should be 'auto', 'full' or 'separable', received 'ful'",
        ),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_options("cma_es", options)
    assert str(error.value) == message


def test_an_unknown_strategy_names_the_closest() -> None:
    with pytest.raises(InputError, match="did you mean 'cma_es'"):
        build_strategy("cma-es", {}, box(2), 0)
