"""Nested MAP beyond the contract: first models, pairs, and the tournament."""

from __future__ import annotations

import numpy as np
import pytest

from mergesearch.evaluators.synthetic_problems import make_problem
from mergesearch.merging import InputError
from mergesearch.search.front import hypervolume
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.nested_map import (
    NestedMap,
    Pair,
    Side,
    closest,
    first_sides,
    share_tasks,
)
from mergesearch.search.strategies.sobol import Sobol


def box(dim: int, objectives: int, *, budget: int = 200, high: float = 1.0, **facts) -> Problem:
    known = {
        "weights": np.full(objectives, 1 / objectives),
        "scale": np.tile([0.0, 1.0], (objectives, 1)),
        **facts,
    }
    return Problem(
        np.zeros(dim), np.full(dim, high), np.full(dim, 1 / dim), objectives, budget, **known
    )


def experts(tasks: int, seed: int = 0):
    """Losses and a problem with one coefficient and one expert for each task.

    Its anchors are the base, the experts and their average.

    Every expert is near the optimum of its own task, and every task is hurt a little by the others.
    """
    rng = np.random.default_rng(seed)
    optima = 0.8 * np.eye(tasks) + 0.2 * rng.random((tasks, tasks))
    roots = 0.2 * rng.standard_normal((tasks, tasks, tasks)) / np.sqrt(tasks)
    bends = roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(tasks)
    bends[np.arange(tasks), np.arange(tasks), np.arange(tasks)] += 1.0

    def losses(x: np.ndarray) -> np.ndarray:
        return np.einsum("td,tde,te->t", x - optima, bends, x - optima)

    points = [np.zeros(tasks), *np.eye(tasks), np.full(tasks, 1 / tasks)]
    anchors = tuple(TrialResult(None, point, losses(point)) for point in points)
    values = np.array([anchor.losses for anchor in anchors])
    scale = np.stack([values.min(axis=0), values.max(axis=0)], axis=1)
    return losses, box(tasks, tasks, budget=400, high=1.5, anchors=anchors, scale=scale)


def drive(
    strategy, function, trials: int, in_flight: int = 4, fails=lambda number: False
) -> list[TrialResult]:
    """Results in another order than asked."""
    rng = np.random.default_rng(0)
    outstanding = []
    results = []
    asked = 0
    while len(results) < trials:
        while len(outstanding) < in_flight and asked < trials:
            new = strategy.ask(1)
            assert len(new) == 1  # never waits
            outstanding += new
            asked += 1
        done = outstanding.pop(int(rng.integers(len(outstanding))))
        results.append(
            TrialResult(done.id, done.point, None if fails(done.id) else function(done.point))
        )
        strategy.tell([results[-1]])
    return results


# --- first models
# ----------------------------------------------------------------------------


def test_the_best_anchor_of_each_task_begins_with_its_tasks() -> None:
    points = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    losses = np.array([[0.9, 0.9, 0.9], [0.1, 0.8, 0.2], [0.8, 0.1, 0.9]])
    anchors = tuple(TrialResult(None, x, f) for x, f in zip(points, losses, strict=True))
    sides = first_sides(box(3, 3, anchors=(*anchors, TrialResult(None, points[0], None))), 20)
    assert [(side.point.tolist(), side.tasks) for side in sides] == [
        ([1, 0, 0], (0, 2)),
        ([0, 1, 0], (1,)),
    ]
    assert not any(side.waiting for side in sides)


def test_vertices_begin_where_one_anchor_or_none_is_best() -> None:
    start = np.array([1.0, 0.0, 0.0])
    for anchors in ((), (TrialResult(None, start, np.ones(2)),)):
        sides = first_sides(box(3, 2, high=1.5, anchors=anchors), 20)
        np.testing.assert_array_equal([side.point for side in sides], np.eye(3))
        assert [side.waiting for side in sides] == [not anchors, True, True]


def test_a_short_budget_makes_groups_of_coordinates() -> None:
    sides = first_sides(box(6, 2, budget=120), 20)
    np.testing.assert_array_equal(
        [side.point for side in sides], [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    )


def test_tasks_without_a_model_go_to_the_best_at_them() -> None:
    sides = [
        Side(np.zeros(2), losses=np.array([1.0, 2.0, 0.0])),
        Side(np.ones(2), losses=np.array([0.0, 1.0, 1.0])),
    ]
    share_tasks([*sides, Side(np.ones(2))], 3)
    assert [side.tasks for side in sides] == [(2,), (0, 1)]


def test_the_closest_pair_is_next_and_failures_are_last() -> None:
    scores = [0.0, 1.0, 0.3, None, 0.9]
    sides = [
        Side(np.full(2, 0.1 * n), losses=None if s is None else np.array([s, s]))
        for n, s in enumerate(scores)
    ]
    assert [sides.index(side) for side in closest(sides, box(2, 2))] == [1, 4]
    assert [sides.index(side) for side in closest([sides[0], sides[1], sides[3]], box(2, 2))] == [
        0,
        1,
    ]


# --- a pair
# ----------------------------------------------------------------------------


def run_pair(problem: Problem, sides: tuple[Side, Side], function) -> Pair:
    pair = Pair(problem, *sides, points=20, explore=0.5, seed=0)
    for _ in range(40):
        if pair.merged is not None:
            break
        number, point = pair.ask()
        pair.tell(number, TrialResult(None, point, function(point)))
    assert pair.merged is not None
    return pair


def two_tasks(weights: np.ndarray):
    """Two experts whose tasks disagree; the optimum at given weights has a closed form."""
    optima = np.array([[0.9, 0.1], [0.2, 0.8]])
    bend = np.array([[1.0, 0.3], [0.3, 1.0]])

    def losses(x: np.ndarray) -> np.ndarray:
        return np.array([offset @ bend @ offset for offset in x - optima])

    problem = box(2, 2, weights=weights)
    sides = tuple(Side(x, (task,), losses(x)) for task, x in enumerate(np.eye(2)))
    return problem, sides, losses, weights @ optima


@pytest.mark.parametrize("weights", [np.array([0.5, 0.5]), np.array([0.2, 0.8])])
def test_a_pair_finds_the_coefficients_that_its_tasks_weights_ask_for(weights: np.ndarray) -> None:
    problem, sides, losses, optimum = two_tasks(weights)
    pair = run_pair(problem, sides, losses)
    np.testing.assert_allclose(pair.merged.point, optimum, atol=0.05)
    assert pair.merged.tasks == (0, 1)


def test_only_the_tasks_of_its_sides_matter() -> None:
    """A third task, which no side stands for, pulls elsewhere and is not heard."""
    _, sides, losses, optimum = two_tasks(np.array([0.5, 0.5]))
    whole = box(2, 3, weights=np.array([0.1, 0.1, 0.8]))

    def three(x: np.ndarray) -> np.ndarray:
        return np.append(losses(x), np.sum((x - 1.0) ** 2))

    heard = tuple(Side(side.point, side.tasks, three(side.point)) for side in sides)
    np.testing.assert_allclose(run_pair(whole, heard, three).merged.point, optimum, atol=0.05)


def test_a_merge_is_never_worse_than_its_sides() -> None:
    """The result of a pair is never worse than its ends.

    Here every other merge that the pair measures is worse than both.
    """
    problem, sides, _, _ = two_tasks(np.array([0.5, 0.5]))
    ends = tuple(Side(side.point, side.tasks, np.array([0.1, 0.1])) for side in sides)
    merged = run_pair(problem, ends, lambda x: np.array([1.0 + x[0], 1.0 - x[0]])).merged
    assert merged.losses.tolist() == [0.1, 0.1]


def test_merges_stay_in_the_box() -> None:
    problem = Problem(
        np.full(2, 0.8),
        np.full(2, 1.3),
        np.ones(2),
        2,
        100,
        np.array([[0.0, 1.0]] * 2),
        np.array([0.5, 0.5]),
    )
    pair = Pair(problem, Side(np.array([1.3, 0.8])), Side(np.array([0.8, 1.3])), 20, 0.5, 0)
    for _ in range(15):
        point = pair.ask()[1]
        assert np.all((point >= 0.8) & (point <= 1.3))


def test_a_pair_of_failures_ends_too() -> None:
    problem, sides, _, _ = two_tasks(np.array([0.5, 0.5]))
    pair = Pair(problem, Side(sides[0].point), Side(sides[1].point), 20, 0.5, 0)
    for _ in range(21):
        number, point = pair.ask()
        pair.tell(number, TrialResult(None, point, None))
    assert pair.merged is not None
    assert pair.merged.losses is None


# --- the tournament
# ----------------------------------------------------------------------------


def test_one_model_is_left_after_twenty_trials_and_a_merge_for_every_pair() -> None:
    losses, problem = experts(5)
    strategy = NestedMap(problem, 0)
    assert len(strategy._sides) == 5
    drive(strategy, losses, 4 * (20 + 1), in_flight=1)
    assert strategy.best() == []
    strategy.ask(1)
    assert strategy._pair is None
    assert len(strategy.best()) == 1
    assert [sorted(side.tasks) for side in strategy._sides] == [[0, 1, 2, 3, 4]]


def test_it_beats_every_anchor_and_random_search() -> None:
    losses, problem = experts(6)
    best_anchor = min(problem.scalarise(anchor.losses) for anchor in problem.anchors)
    ours, random = (
        min(problem.scalarise(result.losses) for result in drive(make(problem, 0), losses, 140))
        for make in (NestedMap, Sobol)
    )
    assert ours < 0.8 * best_anchor
    assert ours < random


def test_afterwards_it_covers_the_front() -> None:
    made = make_problem("quadratic_tasks", 4, seed=1)
    optimal = np.array([made.losses(x) for x in made.pareto_set(300)])
    low = optimal.min(axis=0)
    high = optimal.max(axis=0)
    results = drive(NestedMap(box(4, 2, budget=220), 0), made.losses, 220)
    reached = np.array([result.losses for result in results])
    volumes = [hypervolume((rows - low) / (high - low), [1.1, 1.1]) for rows in (reached, optimal)]
    assert volumes[0] > 0.97 * volumes[1]


def test_a_pair_goes_on_proposing_while_its_results_are_outstanding() -> None:
    losses, problem = experts(3)
    strategy = NestedMap(problem, 0)
    first = strategy.ask(40)
    pair = strategy._pair
    assert len(np.unique([s.point for s in first], axis=0)) == 40
    assert all(errand.pair is pair for errand in strategy._book.outstanding)
    strategy.tell([TrialResult(s.id, s.point, losses(s.point)) for s in first])
    chosen = strategy.ask(3)
    assert strategy._book.outstanding[0].number == -1  # the merge, then more of the design
    strategy.tell([TrialResult(s.id, s.point, losses(s.point)) for s in chosen])
    strategy.ask(1)
    assert strategy._pair is not pair


def test_vertices_are_measured_before_they_are_paired() -> None:
    strategy = NestedMap(box(3, 2), 0)
    asked = strategy.ask(5)
    np.testing.assert_array_equal([s.point for s in asked[:3]], np.eye(3))
    assert strategy._pair is None
    strategy.tell([TrialResult(s.id, s.point, np.array([s.point[0], s.point[1]])) for s in asked])
    strategy.ask(1)
    assert strategy._pair is not None


def test_many_failures_do_not_end_the_tournament() -> None:
    losses, problem = experts(4)
    strategy = NestedMap(problem, 0)
    drive(strategy, losses, 120, fails=lambda number: number % 3 != 0)
    assert len(strategy._sides) == 1
    assert len(strategy.best()) == 1


def test_same_calls_same_points() -> None:
    losses, problem = experts(4)
    traces = [
        np.array([r.point for r in drive(NestedMap(problem, seed), losses, 90)])
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(traces[0], traces[1])
    assert not np.array_equal(traces[0], traces[2])


def test_too_many_coordinates_are_refused() -> None:
    with pytest.raises(InputError, match="at most 256 coordinates for nested_map, received 257"):
        NestedMap(box(257, 2), 0)
