"""The strategy contract. To add a strategy: put it in ``STRATEGIES``; it is tested here without another line.

Every member must pass at every dimension below, or refuse one with a clear :class:`InputError`.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from search.strategies import STRATEGIES, build_strategy, check_options
from search.strategy import Problem, Strategy, Suggestion, Told

NAMES = sorted(STRATEGIES)
DIMENSIONS = [1, 2, 7, 40, 300, 2000]


def make_problem(dim: int, objectives: int = 1) -> Problem:
    lower = np.linspace(-1.0, 0.0, dim)
    return Problem(
        lower=lower,
        upper=lower + np.linspace(1.0, 2.0, dim),
        start=lower + 0.3,
        objectives=objectives,
        budget=200,
        scale=np.tile([0.0, 1.0], (objectives, 1)),
        weights=np.full(objectives, 1 / objectives),
    )


def make(name: str, problem: Problem, seed: int = 3) -> Strategy:
    return build_strategy(name, check_options(name, {}), problem, seed)


def losses(point: np.ndarray, objectives: int = 1) -> np.ndarray:
    return np.array([float(np.mean((point - 0.2 - 0.1 * place) ** 2)) for place in range(objectives)])


def told(suggestion: Suggestion, *, failed: bool = False, objectives: int = 1) -> Told:
    return Told(suggestion.id, suggestion.point, None if failed else losses(suggestion.point, objectives))


def points(suggestions: list[Suggestion]) -> np.ndarray:
    return np.array([suggestion.point for suggestion in suggestions])


@pytest.mark.parametrize("name", NAMES)
class TestStrategyContract:
    @pytest.mark.parametrize("dim", DIMENSIONS)
    def test_points_lie_in_the_box_at_any_dimension(self, name: str, dim: int) -> None:
        problem = make_problem(dim)
        strategy = make(name, problem)
        for _ in range(30):
            suggestions = strategy.ask(2)
            assert [s.point.shape for s in suggestions] == [(dim,)] * 2
            assert np.all(points(suggestions) >= problem.lower)
            assert np.all(points(suggestions) <= problem.upper)
            strategy.tell([told(s) for s in suggestions])
        for point in strategy.best():
            assert np.all((point >= problem.lower) & (point <= problem.upper))

    def test_ids_count_from_zero(self, name: str) -> None:
        strategy = make(name, make_problem(3))
        assert [s.id for s in strategy.ask(3) + strategy.ask(2)] == [0, 1, 2, 3, 4]

    def test_asking_for_several_equals_asking_one_by_one(self, name: str) -> None:
        together, single = make(name, make_problem(5)), make(name, make_problem(5))
        for _ in range(6):
            batch = together.ask(4)
            singles = [single.ask(1)[0] for _ in range(4)]
            assert np.array_equal(points(batch), points(singles))
            together.tell([told(s) for s in batch])
            for suggestion in singles:
                single.tell([told(suggestion)])

    def test_same_seed_same_points_other_seed_other_points(self, name: str) -> None:
        first, second, other = (make(name, make_problem(6), seed) for seed in (1, 1, 2))
        for _ in range(40):
            asked = [strategy.ask(1)[0] for strategy in (first, second, other)]
            assert np.array_equal(asked[0].point, asked[1].point)
            assert not np.array_equal(asked[0].point, asked[2].point)
            for strategy, suggestion in zip((first, second, other), asked, strict=True):
                strategy.tell([told(suggestion)])

    def test_global_generators_are_neither_read_nor_written(self, name: str) -> None:
        before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002  # the state under test
        reference = self._trace(name)
        assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
        assert random.getstate() == before[1]
        np.random.seed(123)  # noqa: NPY002
        random.seed(123)
        assert np.array_equal(self._trace(name), reference)

    def _trace(self, name: str) -> np.ndarray:
        strategy, asked = make(name, make_problem(4)), []
        for _ in range(40):
            asked += strategy.ask(1)
            strategy.tell([told(asked[-1])])
        return points(asked)

    @pytest.mark.parametrize("dim", [1, 9, 260])
    def test_replay_of_an_asynchronous_run_is_exact(self, name: str, dim: int) -> None:
        """Results out of order, some failed, up to seven outstanding: the same calls give the same points."""
        rng = np.random.default_rng(0)
        strategy = make(name, make_problem(dim))
        calls: list[Suggestion | Told] = []
        outstanding: list[Suggestion] = []
        for _ in range(60):
            while len(outstanding) < rng.integers(1, 8):
                outstanding += strategy.ask(1)
                calls.append(outstanding[-1])
            done = outstanding.pop(int(rng.integers(len(outstanding))))
            calls.append(told(done, failed=bool(rng.random() < 0.2)))
            strategy.tell([calls[-1]])
        again = make(name, make_problem(dim))
        for call in calls:
            if isinstance(call, Told):
                again.tell([call])
            else:
                assert np.array_equal(again.ask(1)[0].point, call.point)
        assert np.array_equal(np.array(strategy.best()), np.array(again.best()))

    def test_nothing_but_failures_does_not_stop_it(self, name: str) -> None:
        strategy = make(name, make_problem(8))
        for _ in range(50):
            suggestion = strategy.ask(1)[0]
            assert np.all(np.isfinite(suggestion.point))
            strategy.tell([told(suggestion, failed=True)])

    def test_a_space_of_a_single_point(self, name: str) -> None:
        problem = make_problem(3)
        point = Problem(
            lower=problem.lower,
            upper=problem.lower,
            start=problem.lower,
            objectives=1,
            budget=5,
            scale=problem.scale,
            weights=problem.weights,
        )
        strategy = make(name, point)
        for _ in range(5):
            suggestion = strategy.ask(1)[0]
            assert np.array_equal(suggestion.point, problem.lower)
            strategy.tell([told(suggestion)])

    def test_a_fixed_coordinate_stays_fixed(self, name: str) -> None:
        problem = make_problem(4)
        upper = problem.upper.copy()
        upper[2] = problem.lower[2]
        start = np.minimum(problem.start, upper)
        strategy = make(name, Problem(problem.lower, upper, start, 1, 50, problem.scale, problem.weights))
        for _ in range(30):
            suggestion = strategy.ask(1)[0]
            assert suggestion.point[2] == problem.lower[2]
            strategy.tell([told(suggestion)])

    def test_several_objectives(self, name: str) -> None:
        strategy = make(name, make_problem(5, objectives=3))
        for _ in range(30):
            suggestion = strategy.ask(1)[0]
            strategy.tell([told(suggestion, objectives=3)])
        assert len(strategy.ask(2)) == 2

    def test_recommends_only_what_it_declares(self, name: str) -> None:
        strategy = make(name, make_problem(4))
        for _ in range(30):
            strategy.tell([told(strategy.ask(1)[0])])
        assert bool(strategy.best()) == strategy.recommends
