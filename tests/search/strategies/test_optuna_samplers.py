"""Optuna's samplers behind the contract: agreement with the library, first points, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.optuna import OptunaSampler
from mergesearch.search.strategies.parts.optuna_samplers import LIMITS
from mergesearch.search.strategies.table import check_options

SAMPLERS = sorted(LIMITS)


def box(dim: int, objectives: int = 1, anchors: int = 0, budget: int = 100) -> Problem:
    """The unit box from 0.3, with anchors from the start towards 0.9."""
    problem = Problem(
        np.zeros(dim),
        np.ones(dim),
        np.full(dim, 0.3),
        objectives,
        budget,
        np.tile([0.0, 1.0], (objectives, 1)),
        np.full(objectives, 1 / objectives),
    )
    points = [np.full(dim, value) for value in np.linspace(0.3, 0.9, anchors)]
    return replace(
        problem,
        anchors=tuple(TrialResult(None, point, spheres(point, objectives)) for point in points),
    )


def spheres(x: np.ndarray, objectives: int = 1) -> np.ndarray:
    return np.array([float(np.mean((x - 0.55 + 0.3 * index) ** 2)) for index in range(objectives)])


def minimise(
    strategy: OptunaSampler, objectives: int, trials: int, in_flight: int = 1
) -> np.ndarray:
    """Losses of all trials, ``(trials, objectives)``; told oldest first."""
    outstanding = []
    losses = []
    for _ in range(trials):
        outstanding += strategy.ask(1)
        if len(outstanding) >= in_flight:
            done = outstanding.pop(0)
            losses.append(spheres(done.point, objectives))
            strategy.tell([TrialResult(done.id, done.point, losses[-1])])
    return np.array(losses)


def library_sampler(name: str, seed: int, dim: int):
    from optuna import samplers
    from optuna.samplers import nsgaii

    if name == "tpe":
        return samplers.TPESampler(
            n_startup_trials=3, multivariate=True, constant_liar=True, seed=seed
        )
    if name == "gp":
        return samplers.GPSampler(n_startup_trials=3, seed=seed)
    if name == "cma_es":
        x0 = {f"x{index:04d}": 0.3 for index in range(dim)}
        return samplers.CmaEsSampler(x0=x0, sigma0=0.15, n_startup_trials=3, seed=seed)
    if name == "qmc":
        return samplers.QMCSampler(scramble=True, seed=seed)
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    kind = samplers.NSGAIISampler if name == "nsga2" else samplers.NSGAIIISampler
    crossover = nsgaii.SBXCrossover(eta=15)
    mutation = nsgaii.PolynomialMutation(eta=20)
    return kind(
        population_size=3, crossover=crossover, mutation=mutation, mutation_prob=1 / dim, seed=seed
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLERS)
def test_points_are_those_of_the_library(name: str) -> None:
    """Three anchors satisfy ``startup``: every point is the sampler's. One is always in flight."""
    import optuna

    dim = 3
    problem = box(3, anchors=3)
    strategy = OptunaSampler(problem, 5, sampler=name, startup=3)
    seed = int(np.random.default_rng(5).integers(2**31))
    study = optuna.create_study(sampler=library_sampler(name, seed, dim))
    names = [f"x{index:04d}" for index in range(dim)]
    distributions = {name: optuna.distributions.FloatDistribution(0, 1) for name in names}
    for anchor in sorted(problem.anchors, key=lambda anchor: anchor.losses[0]):
        params = dict(zip(names, anchor.point.tolist(), strict=True))
        if LIMITS[name].genetic:
            study.enqueue_trial(params)
            trial = study.ask(distributions)
            assert trial.relative_params == {}  # the first generation has no parents
            study.tell(trial, anchor.losses[0])
        else:
            value = float(anchor.losses[0])
            study.add_trial(
                optuna.create_trial(params=params, distributions=distributions, value=value)
            )
    suggestion = strategy.ask(1)[0]
    trial = study.ask(distributions)
    for _ in range(4 if name == "gp" else 12):
        following = strategy.ask(1)[0], study.ask(distributions)
        point = np.array([trial.params[name] for name in names])
        np.testing.assert_allclose(suggestion.point, point, rtol=0, atol=1e-12)
        loss = spheres(point)
        strategy.tell([TrialResult(suggestion.id, suggestion.point, loss)])
        study.tell(trial, loss[0])
        suggestion, trial = following


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_start_comes_first_then_draws_around_it_until_enough_have_completed(name: str) -> None:
    strategy = OptunaSampler(box(10), 0, sampler=name, startup=4)
    asked = strategy.ask(12)
    assert np.array_equal(asked[0].point, box(10).start)
    assert (
        np.sqrt(np.mean([(s.point - 0.3) ** 2 for s in asked[1:]])) < 0.22
    )  # uniform would be 0.35
    strategy.tell([TrialResult(s.id, s.point, None) for s in asked[4:]])
    strategy.tell([TrialResult(s.id, s.point, spheres(s.point)) for s in asked[:3]])
    assert "fixed_params" in _last(strategy).system_attrs
    strategy.tell([TrialResult(asked[3].id, asked[3].point, spheres(asked[3].point))])
    assert "fixed_params" not in _last(strategy).system_attrs


def _last(strategy: OptunaSampler):
    strategy.ask(1)
    return strategy._study.get_trials(deepcopy=False)[-1]


def test_a_start_that_has_been_measured_is_not_asked_again() -> None:
    strategy = OptunaSampler(box(4, anchors=3), 0)
    assert not np.array_equal(strategy.ask(1)[0].point, box(4).start)
    assert strategy._completed == 3


@pytest.mark.parametrize(
    ("name", "shrinks_to"), [("tpe", 0.1), ("gp", 0.05), ("cma_es", 0.03), ("nsga2", 0.3)]
)
def test_sphere_with_three_in_flight(name: str, shrinks_to: float) -> None:
    trials = {"gp": 24}.get(name, 150)
    startup = {"nsga2": 12, "gp": 12}.get(name)
    losses = minimise(
        OptunaSampler(box(4, anchors=2), 0, sampler=name, startup=startup), 1, trials, in_flight=3
    )
    assert losses.min() < shrinks_to * spheres(box(4).start)[0]


@pytest.mark.parametrize("name", ["tpe", "nsga2", "nsga3"])
def test_several_objectives_as_they_are(name: str) -> None:
    """A front between the optima 0.55 and 0.25, wider than what the weighted sum would find."""
    strategy = OptunaSampler(box(2, 2), 0, sampler=name, startup=12)
    losses = minimise(strategy, 2, 120, in_flight=2)
    assert len(strategy._study.directions) == 2
    assert losses[:12, 0].min() > 1e-2
    assert np.all(losses[12:].min(axis=0) < 3e-3)


def test_other_samplers_combine_objectives_by_their_weights() -> None:
    problem = replace(
        box(2, 2), weights=np.array([1.0, 0.0]), scale=np.array([[0.0, 2.0], [0.0, 1.0]])
    )
    for name in ("cma_es", "qmc", "random"):
        strategy = OptunaSampler(problem, 0, sampler=name)
        suggestion = strategy.ask(1)[0]
        strategy.tell([TrialResult(suggestion.id, suggestion.point, np.array([0.5, 3.0]))])
        assert strategy._study.get_trials()[-1].values == [0.25]


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_failures_and_foreign_results(name: str) -> None:
    from optuna.trial import TrialState

    strategy = OptunaSampler(box(2), 0, sampler=name, startup=3)
    first, second, third = strategy.ask(3)
    elsewhere = np.full(2, 0.77)
    strategy.tell([TrialResult(first.id, first.point, None)])
    strategy.tell(
        [TrialResult(second.id, elsewhere, np.array([1.0]))]
    )  # continued from the record: another point
    strategy.tell([TrialResult(None, elsewhere, np.array([2.0]))])
    strategy.tell(
        [TrialResult(None, elsewhere, np.array([-9.0]), evaluated=3)]
    )  # fewer items: passed over
    strategy.tell([TrialResult(third.id, third.point, np.array([3.0]))])
    trials = strategy._study.get_trials(deepcopy=False)
    assert sorted(trial.value for trial in trials if trial.state is TrialState.COMPLETE) == [
        1.0,
        2.0,
        3.0,
    ]
    assert sum(trial.state is TrialState.FAIL for trial in trials) == 2
    assert sum(list(trial.params.values()) == [0.77, 0.77] for trial in trials) == 2
    if name == "nsga2":  # three members fill the first generation
        strategy.ask(1)
        generations = [
            trial.system_attrs["NSGAIISampler:generation"] for trial in strategy._study.get_trials()
        ]
        assert generations == [0, 0, 0, 0, 0, 1]


def test_random_and_tpe_replay_exactly_out_of_order() -> None:
    for name in ("random", "tpe"):
        traces = []
        for _ in range(2):
            strategy = OptunaSampler(box(3), 1, sampler=name)
            rng = np.random.default_rng(0)
            trace = []
            outstanding = strategy.ask(6)
            for _ in range(40):
                done = outstanding.pop(int(rng.integers(6)))
                losses = None if rng.random() < 0.2 else spheres(done.point)
                strategy.tell([TrialResult(done.id, done.point, losses)])
                outstanding += strategy.ask(1)
                trace.append(outstanding[-1].point)
            traces.append(trace)
        assert np.array_equal(*traces)


def test_the_generator_of_torch_is_left_alone() -> None:
    import torch

    before = torch.get_rng_state()
    strategy = OptunaSampler(box(2, anchors=3), 0, sampler="gp", startup=3)
    strategy.ask(2)
    assert torch.equal(before, torch.get_rng_state())


def test_no_log_lines(capfd: pytest.CaptureFixture[str]) -> None:
    for name in SAMPLERS:
        minimise(OptunaSampler(box(2, anchors=2), 0, sampler=name, startup=3), 1, 6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "dim", "objectives", "message"),
    [
        ("tpe", 129, 1, "expected at most 128 dimensions for tpe, received 129"),
        ("gp", 33, 1, "expected at most 32 dimensions for gp, received 33"),
        ("cma_es", 101, 1, "choose the strategy cma_es"),
        ("nsga2", 2001, 2, "choose the strategy nsga2"),
        ("qmc", 1001, 1, "an ask takes 40 ms at 1,000"),
    ],
)
def test_what_takes_too_long_is_refused_with_the_cost(
    name: str, dim: int, objectives: int, message: str
) -> None:
    with pytest.raises(InputError, match=r"^strategy\.sampler: ") as error:
        OptunaSampler(box(dim, objectives), 0, sampler=name)
    assert message in str(error.value)
    OptunaSampler(box(LIMITS[name].most, objectives), 0, sampler=name)


def test_long_budgets_are_refused_for_gp() -> None:
    with pytest.raises(InputError, match="expected a budget of at most 500 for gp, received 501"):
        OptunaSampler(box(2, budget=501), 0, sampler="gp")


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InputError, match=r"strategy\.sampler: Input should be 'tpe', 'gp', "):
        check_options("optuna", {"sampler": "cmaes"})
    with pytest.raises(
        InputError, match=r"strategy\.startup: Input should be greater than or equal to 2"
    ):
        check_options("optuna", {"startup": 1})
