"""Evo-Merging beyond the contract: two stages, their scores, and a sparse optimum that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.cma_es import CmaEs
from mergesearch.search.strategies.evo_merging import EvoMerging

ADAPTERS = 6
KEEP = np.array([0.2, 0.9, 0.4, 0.7, 0.3, 0.5])
SCALE = np.array([0.8, 0.0, -0.6, 0.0, 0.0, 0.4])


def pool(budget: int = 1200, adapters: int = ADAPTERS) -> Problem:
    """The box of :class:`spaces.AdapterSpace`."""
    return Problem(
        np.repeat([0.0, -1.5], adapters),
        np.repeat([1.0, 1.5], adapters),
        np.repeat([1.0, 1 / adapters], adapters),
        1,
        budget,
        np.array([[0.0, 1.0]]),
        np.array([1.0]),
    )


def error(point: np.ndarray) -> float:
    """Zero where the right share of every adapter is added with the right scale."""
    keep, scale = np.split(point, 2)
    return float(np.sum((keep - KEEP) ** 2) + np.sum((scale - SCALE) ** 2))


def result(suggestion, function: Callable[[np.ndarray], float] = error) -> TrialResult:
    return TrialResult(suggestion.id, suggestion.point, np.array([function(suggestion.point)]))


def run(
    strategy: EvoMerging, trials: int, function: Callable[[np.ndarray], float] = error
) -> list[TrialResult]:
    told = []
    for _ in range(trials):
        told.append(result(strategy.ask(1)[0], function))
        strategy.tell([told[-1]])
    return told


def test_recovers_a_known_sparse_optimum() -> None:
    problem = pool()
    assert error(problem.start) > 2
    errors = []
    for seed in range(3):
        strategy = EvoMerging(problem, seed, population=8)
        run(strategy, problem.budget)
        keep, scale = np.split(strategy.best()[0], 2)
        # (x − x*)² + 0.05 / 6 · |x| is least at x* − 0.0042 sign(x*), or at 0.
        errors.append(max(np.abs(keep - KEEP).max(), np.abs(scale - SCALE).max()))
        assert np.all(np.sign(np.round(scale, 1)) == np.sign(SCALE))
    assert max(errors) < 0.03


def test_each_stage_keeps_the_other_half_as_it_is() -> None:
    problem = pool(budget=90)
    told = run(EvoMerging(problem, 0), 90)
    keeps, scales = np.split(np.array([trial.point for trial in told]), 2, axis=1)
    assert np.all(scales[:30] == problem.start[ADAPTERS:])
    assert np.all(keeps[30:] == keeps[30])
    assert len(np.unique(keeps[:30], axis=0)) == len(np.unique(scales[30:], axis=0)) // 2 == 30


def test_stage_two_holds_the_best_of_stage_one_with_its_penalty() -> None:
    told = run(EvoMerging(pool(budget=90), 1, penalty=20.0), 90)
    keeps = np.array([trial.point[:ADAPTERS] for trial in told[:30]])
    losses = np.array([trial.losses[0] for trial in told[:30]])
    plain = int(np.argmin(losses))
    penalised = int(np.argmin(losses + 20.0 * np.abs(keeps).mean(axis=1)))
    assert plain != penalised
    assert np.array_equal(told[30].point[:ADAPTERS], keeps[penalised])


def test_first_stage_is_cma_es_on_the_penalised_loss() -> None:
    problem = pool(budget=300)
    strategy = EvoMerging(problem, 5)
    half = slice(0, ADAPTERS)
    inner = replace(
        problem,
        lower=problem.lower[half],
        upper=problem.upper[half],
        start=problem.start[half],
        budget=100,
    )
    seed = int(np.random.SeedSequence(5).generate_state(2)[0])
    reference = CmaEs(inner, seed, sigma=0.05, population=20)
    for _ in range(100):
        ours = strategy.ask(1)[0]
        theirs = reference.ask(1)[0]
        assert np.array_equal(ours.point[half], theirs.point)
        loss = error(ours.point)
        strategy.tell([TrialResult(ours.id, ours.point, np.array([loss]))])
        penalised = loss + 0.05 * np.abs(theirs.point).mean()
        reference.tell([TrialResult(theirs.id, theirs.point, np.array([penalised]))])


def test_scores_of_stage_one_do_not_bind_stage_two() -> None:
    """The scales move to their optimum although all losses of stage 1 are lower."""
    strategy = EvoMerging(pool(budget=900), 0)
    run(strategy, 300, lambda point: error(point) - 100.0)
    run(strategy, 600, error)
    assert np.abs(strategy.best()[0][ADAPTERS:] - SCALE).max() < 0.05


def test_late_results_of_stage_one_change_nothing() -> None:
    one = EvoMerging(pool(budget=60), 0)
    other = EvoMerging(pool(budget=60), 0)
    for strategy in (one, other):
        early = strategy.ask(10)
        late = strategy.ask(10)
        strategy.tell([result(s) for s in early])
        strategy.ask(1)
        if strategy is other:
            strategy.tell([replace(result(s), losses=np.array([-50.0])) for s in late])
    assert [p.tolist() for p in (s.point for s in one.ask(30))] == [
        p.tolist() for p in (s.point for s in other.ask(30))
    ]


def test_results_of_others_count_where_they_fit_the_stage() -> None:
    problem = pool(budget=60)
    fits = problem.start.copy()
    fits[:ADAPTERS] = KEEP
    for point, expected in ((fits, KEEP), (np.concatenate([KEEP, SCALE]), None)):
        strategy = EvoMerging(problem, 0)
        strategy.tell([TrialResult(None, point, np.array([-5.0]))])
        told = run(strategy, 30)
        assert np.array_equal(told[-1].point[:ADAPTERS], KEEP) == (expected is not None)


def test_anchors_count_from_the_beginning() -> None:
    anchor = TrialResult(None, pool().start, np.array([-5.0]))
    strategy = EvoMerging(replace(pool(budget=60), anchors=(anchor,)), 0)
    assert np.array_equal(run(strategy, 30)[-1].point[:ADAPTERS], pool().start[:ADAPTERS])


def test_failures_in_stage_one_leave_what_is_kept_as_it_was() -> None:
    strategy = EvoMerging(pool(budget=60), 0)
    for _ in range(20):
        suggestion = strategy.ask(1)[0]
        strategy.tell([TrialResult(suggestion.id, suggestion.point, None)])
    assert np.array_equal(strategy.ask(1)[0].point[:ADAPTERS], pool().start[:ADAPTERS])


def test_first_steps_are_small() -> None:
    points = np.array([s.point for s in EvoMerging(pool(), 0).ask(200)])[:, :ADAPTERS]
    assert points.max() <= 1.0
    assert 0.9 < points.mean() < 1.0


def test_an_odd_dimension_is_refused() -> None:
    problem = pool()
    odd = replace(
        problem, lower=problem.lower[1:], upper=problem.upper[1:], start=problem.start[1:]
    )
    with pytest.raises(
        InputError, match=r"strategy\.evo_merging: expected an even number of coordinates"
    ):
        EvoMerging(odd, 0)
