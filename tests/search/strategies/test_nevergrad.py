"""nevergrad behind the contract: agreement with the library, refusals, failures, convergence."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.nevergrad import FAULTS, Nevergrad, parts_of

NAMED = ("NGOpt", "CMA", "DiagonalCMA", "TBPSA", "DE", "TwoPointsDE", "OnePlusOne", "PSO")


def box(dim: int, budget: int = 100, low: float = 0.0, high: float = 1.0) -> Problem:
    start = np.full(dim, low + 0.3 * (high - low))
    return Problem(
        np.full(dim, low),
        np.full(dim, high),
        start,
        1,
        budget,
        np.array([[0.0, 1.0]]),
        np.array([1.0]),
    )


def sphere(x: np.ndarray) -> float:
    return float(np.sum((x - 0.55) ** 2))


def library(name, dim: int, budget: int = 100, seed: int | None = None, workers: int = 2):
    """The optimizer as nevergrad builds it, in the unit box from 0.3."""
    import nevergrad as ng

    array = ng.p.Array(init=np.full(dim, 0.3), lower=0.0, upper=1.0)
    state = np.random.SeedSequence(seed or 0).spawn(2)[0]
    array.random_state = np.random.RandomState(np.random.MT19937(state))
    made = ng.optimizers.registry[name] if isinstance(name, str) else name
    with warnings.catch_warnings(action="ignore"):
        return made(array, budget=budget, num_workers=workers)


def run_library(
    engine, asks: int, in_flight: int = 1, *, shuffle: bool = False
) -> list[np.ndarray]:
    """Ask and tell, oldest first or in any order."""
    points = []
    outstanding = []
    rng = np.random.default_rng(0)
    with warnings.catch_warnings(action="ignore"):
        for _ in range(asks):
            outstanding.append(engine.ask())
            points.append(outstanding[-1].value)
            if len(outstanding) >= in_flight:
                candidate = outstanding.pop(int(rng.integers(in_flight)) if shuffle else 0)
                engine.tell(candidate, sphere(candidate.value))
    return points


def minimise(strategy, function, trials: int, in_flight: int = 1) -> None:
    outstanding = []
    for _ in range(trials):
        outstanding += strategy.ask(1)
        if len(outstanding) >= in_flight:
            done = outstanding.pop(0)
            strategy.tell([TrialResult(done.id, done.point, np.array([function(done.point)]))])


@pytest.mark.parametrize("name", NAMED)
def test_points_are_those_of_the_library(name: str) -> None:
    """NGOpt too: its meta-model would propose from 45 results in 8 dimensions."""
    engine = library(name, 8, seed=7)
    engine.suggest(np.full(8, 0.3))
    expected = run_library(engine, 40, in_flight=3)
    strategy = Nevergrad(box(8), 7, optimizer=name)
    asked = []
    outstanding = []
    for _ in range(40):
        outstanding += strategy.ask(1)
        asked.append(outstanding[-1].point)
        if len(outstanding) >= 3:
            done = outstanding.pop(0)
            strategy.tell([TrialResult(done.id, done.point, np.array([sphere(done.point)]))])
    np.testing.assert_allclose(asked, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        strategy.best()[0], engine.provide_recommendation().value, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "shrinks_to"),
    [
        ("NGOpt", 0.02),
        ("CMA", 1e-3),
        ("DiagonalCMA", 0.02),
        ("OnePlusOne", 1e-4),
        ("DE", 0.1),
        ("PSO", 0.5),
    ],
)
def test_sphere_with_four_in_flight(name: str, shrinks_to: float) -> None:
    ratios = []
    for seed in range(2):
        strategy = Nevergrad(box(4, budget=200), seed, optimizer=name)
        minimise(strategy, sphere, 200, in_flight=4)
        ratios.append(sphere(strategy.best()[0]) / sphere(box(4).start))
    assert np.exp(np.mean(np.log(ratios))) < shrinks_to


@pytest.mark.parametrize("name", ["OnePlusOne", "DE", "TBPSA"])
def test_translation_of_the_box_is_translation_of_the_points(name: str) -> None:
    here = Nevergrad(box(3), 1, optimizer=name)
    there = Nevergrad(box(3, low=10.0, high=14.0), 1, optimizer=name)
    for _ in range(30):
        a = here.ask(1)[0]
        b = there.ask(1)[0]
        np.testing.assert_allclose(10.0 + 4 * a.point, b.point, atol=1e-9)
        for strategy, suggestion in ((here, a), (there, b)):
            strategy.tell(
                [TrialResult(suggestion.id, suggestion.point, np.array([sphere(a.point)]))]
            )


def test_the_start_comes_first_and_populations_are_drawn_around_it() -> None:
    for name in ("DE", "PSO", "TBPSA"):
        points = [suggestion.point for suggestion in Nevergrad(box(50), 0, optimizer=name).ask(20)]
        assert np.array_equal(points[0], box(50).start)
        assert (
            0.1 < np.sqrt(np.mean((np.array(points[1:]) - 0.3) ** 2)) < 0.2
        )  # uniform would be 0.35


@pytest.mark.parametrize(("dim", "budget"), [(1, 60), (2, 100), (3, 100), (2, 1100)])
def test_ngopt_chooses_what_the_library_chooses(dim: int, budget: int) -> None:
    engine = library("NGOpt", dim, budget)
    chosen = [part.name for part in parts_of(engine, chosen=True)]
    assert [
        part.name for part in parts_of(Nevergrad(box(dim, budget), 0)._engine, chosen=True)
    ] == chosen


@pytest.mark.parametrize(("dim", "budget"), [(1, 60), (2, 100)])
def test_ngopt_runs_where_its_meta_model_fails(dim: int, budget: int) -> None:
    """When the library no longer raises, META_MODEL and NEVER can be deleted."""
    with pytest.raises(TypeError, match="0-dimensional"):
        run_library(library("NGOpt", dim, budget), budget)
    minimise(Nevergrad(box(dim, budget), 0), sphere, budget)


def _mean_shift(name: str) -> None:
    engine = library(name, 300)
    run_library(engine, 70)
    run_library(
        engine, 60, in_flight=3
    )  # a population is now asked before the one before has been told


def _sequential() -> None:
    library("NelderMead", 2)


def _fcmaes() -> None:
    library("FCMA", 2).ask()


def _fcmaes_in_one_dimension() -> None:
    from nevergrad.families import ParametrizedCMA

    library(
        ParametrizedCMA(diagonal=True), 1
    ).ask()  # not the registry's: that one would be broken for good


def _high_speed() -> None:
    engine = library("HSDE", 1)
    run_library(engine, 10)
    engine.provide_recommendation()


def _bayesian() -> None:
    engine = library("BO", 2)
    for _ in range(2):
        engine.tell(engine.parametrization.spawn_child(new_value=np.full(2, 0.3)), 1.0)


#: Fault -> an optimizer and a dimension that have it, what the library raises, how.
BROKEN = [
    ("sequential", "NelderMead", 2, ValueError, _sequential),
    ("sequential", "ChainCMAPowell", 2, ValueError, lambda: library("ChainCMAPowell", 2)),
    ("sequential", "ParaPortfolio", 2, None, None),
    ("fcmaes", "FCMA", 2, ImportError, _fcmaes),
    ("fcmaes", "DiagonalCMA", 1, ImportError, _fcmaes_in_one_dimension),
    ("mean_shift", "DiagonalCMA", 300, RuntimeError, lambda: _mean_shift("DiagonalCMA")),
    ("mean_shift", "NGOpt", 300, RuntimeError, lambda: _mean_shift("NGOpt")),
    ("high_speed", "HSDE", 1, TypeError, _high_speed),
    ("bayesian", "BO", 2, Exception, _bayesian),
    ("image_model", "CMAILL", 4, TypeError, lambda: run_library(library("ImageMetaModel", 4), 100)),
    (
        "anisotropic_population",
        "AnisoEMNATBPSA",
        2,
        ValueError,
        lambda: run_library(library("AnisoEMNATBPSA", 2, seed=3), 100, in_flight=7, shuffle=True),
    ),
    (
        "one_coordinate",
        "VoronoiDE",
        1,
        ValueError,
        lambda: run_library(library("VoronoiDE", 1), 60),
    ),
]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # half-built recast optimizers
@pytest.mark.parametrize(("fault", "name", "dim", "raised", "run"), BROKEN)
def test_refused_optimizers_are_broken_in_the_library(
    fault: str, name: str, dim: int, raised, run
) -> None:
    """An entry that fails here has been mended upstream: delete it."""
    if run is not None:
        with pytest.raises(raised):
            run()
    with pytest.raises(InputError, match=r"^strategy\.optimizer: ") as error:
        Nevergrad(box(dim), 0, optimizer=name)
    assert FAULTS[fault].reason in str(error.value)
    assert "choose TBPSA" in str(error.value)


def test_every_fault_is_verified() -> None:
    assert {fault for fault, *_ in BROKEN} | {"import_constants"} == set(FAULTS)


def test_settings_drawn_at_import_differ_from_process_to_process() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore'); import nevergrad as ng\n"
        "print(ng.optimizers.registry['PolyLN'](2, budget=20).optims[0].scale)"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert float(there) != library("PolyLN", 2).optims[0].scale
    with pytest.raises(InputError, match="drawn at random whenever nevergrad is imported"):
        Nevergrad(box(2), 0, optimizer="PolyLN")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MetaModel", "it proposes the optimum of a meta-model, which raises TypeError"),
        ("ChainMetaModelSQP", "proposes the optimum of a meta-model"),
        ("PCABO", "it cannot be built (No module named 'bayes_optim')"),
        (
            "DiscreteDoerrOnePlusOne",
            "it cannot be built (Doerr mutation is implemented only in the sequential case.)",
        ),
        ("ChainCMAPowell", "it contains Powell, which waits for the result of its only suggestion"),
        ("TBPSAA", "expected an optimizer of nevergrad, received 'TBPSAA'; did you mean TBPSA"),
        ("xyzzy", "received 'xyzzy'; choose TBPSA"),
    ],
)
def test_refusals_say_why_and_what_to_choose(name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        Nevergrad(box(4), 0, optimizer=name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_optimizer_that_reads_the_global_generator_is_isolated_from_it() -> None:
    traces = []
    for seed in (1, 2):
        np.random.seed(seed)  # noqa: NPY002  # the state under test
        strategy = Nevergrad(box(6), 0, optimizer="LognormalDiscreteOnePlusOne")
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        minimise(strategy, sphere, 30)
        assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
        traces.append(strategy.ask(5))
    assert np.array_equal([s.point for s in traces[0]], [s.point for s in traces[1]])
    engine = library("LognormalDiscreteOnePlusOne", 6)
    before = np.random.get_state()[2]  # noqa: NPY002
    run_library(engine, 10)
    assert np.random.get_state()[2] != before  # noqa: NPY002  # the library does read it


def test_failures_are_told_as_worse_than_the_worst_and_not_before_there_is_one() -> None:
    strategy = Nevergrad(box(3), 0, optimizer="DE")
    told = []
    engine_tell = strategy._engine.tell
    strategy._engine.tell = lambda candidate, loss: (
        told.append(loss),
        engine_tell(candidate, loss),
    )
    asked = strategy.ask(5)
    losses = [None, 5.0, None, 3.0, None]
    for suggestion, loss in zip(asked, losses, strict=True):
        strategy.tell(
            [
                TrialResult(
                    suggestion.id, suggestion.point, None if loss is None else np.array([loss])
                )
            ]
        )
    assert told == [5.0, 6.0, 6.0, 3.0, 7.0]


def test_a_foreign_result_is_learnt_from() -> None:
    for name in ("DE", "OnePlusOne", "PSO", "NGOpt"):
        strategy = Nevergrad(box(3), 0, optimizer=name)
        minimise(strategy, sphere, 10)
        strategy.tell([TrialResult(None, np.full(3, 0.55), np.array([0.0]))])
        np.testing.assert_allclose(strategy.best()[0], 0.55, atol=1e-12)


def test_results_of_fewer_items_are_passed_over() -> None:
    strategy = Nevergrad(box(3), 0, optimizer="OnePlusOne")
    minimise(strategy, sphere, 10)
    strategy.tell([TrialResult(None, np.full(3, 0.9), np.array([-1.0]), evaluated=5)])
    assert not np.allclose(strategy.best()[0], 0.9)


def test_a_step_size_that_overflowed_does_not_end_the_search() -> None:
    strategy = Nevergrad(box(2), 0, optimizer="OnePlusOne")
    minimise(strategy, sphere, 3)
    strategy._engine._sigma = np.inf
    suggestion = strategy.ask(1)[0]
    assert np.all((suggestion.point >= 0) & (suggestion.point <= 1))
    strategy.tell([TrialResult(suggestion.id, suggestion.point, np.array([1.0]))])
    assert np.all(np.isfinite(strategy.best()[0]))
