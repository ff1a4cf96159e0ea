"""The contract of a search strategy, in plain boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from mergesearch.search.strategies.base import (
    Point,
    Problem,
    Strategy,
    Suggestion,
    TrialResult,
    tell_budget,
)
from mergesearch.search.strategies.table import build_strategy, check_options, get_strategy_info

#: Asks and tells of a test.
STEPS = 25


def box(dim: int, objectives: int) -> Problem:
    """A problem in a box whose sides have different lengths."""
    lower = np.linspace(-1.0, 0.0, dim)
    return Problem(
        lower=lower,
        upper=lower + np.linspace(1.0, 2.0, dim),
        start=lower + 0.3,
        objectives=objectives,
        budget=200,
        scale=np.tile([0.0, 1.0], (objectives, 1)),
        weights=np.full(objectives, 1 / objectives),
        signs=np.ones(objectives),
        names=tuple(f"f{index}" for index in range(objectives)),
        items=20,
    )


class StrategyContract:
    """Tests of a strategy. Subclass it with a name that begins with ``Test``, and set ``name``.

    Attributes:
        name: The strategy's name.
        options: Its options.
        dims: Dimensions to test it in.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    dims: ClassVar[Sequence[int]] = (2, 12)

    def test_points_lie_in_the_box(self) -> None:
        """At every dimension, also those that it recommends."""
        for dim in self.dims:
            problem = self._problem(dim)
            strategy = self._make(problem)
            for _ in range(STEPS):
                for suggestion in strategy.ask(2):
                    self._check_inside(suggestion.point, problem)
                    strategy.tell([_result(suggestion, problem)])
            for point in strategy.best():
                self._check_inside(point, problem)

    def test_ids_count_from_zero(self) -> None:
        """Results are told by id."""
        strategy = self._make(self._problem(self.dims[0]))
        assert [s.id for s in (*strategy.ask(3), *strategy.ask(2))] == [0, 1, 2, 3, 4]

    def test_asking_for_several_equals_asking_one_by_one(self) -> None:
        """Workers come and go; points must not depend on how many ask."""
        problem = self._problem(self.dims[0])
        together = self._make(problem)
        single = self._make(problem)
        for _ in range(6):
            batch = together.ask(4)
            singles = [single.ask(1)[0] for _ in range(4)]
            assert np.array_equal(_points(batch), _points(singles))
            together.tell([_result(s, problem) for s in batch])
            for suggestion in singles:
                single.tell([_result(suggestion, problem)])

    def test_the_seed_decides_the_points(self) -> None:
        """The same one gives the same points; no global generator is read or written."""
        before = np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002
        traces = [self._trace(seed) for seed in (1, 1, 2)]
        assert np.array_equal(traces[0], traces[1])
        assert not np.array_equal(traces[0], traces[2])
        assert np.random.get_state()[1].tobytes() == before  # type: ignore[index]  # noqa: NPY002

    def test_a_record_can_be_replayed(self) -> None:
        """The same asks and tells give the same points, with results late, failed or of others."""
        rng = np.random.default_rng(0)
        problem = self._problem(self.dims[-1])
        strategy = self._make(problem)
        calls: list[Suggestion | TrialResult] = []
        outstanding: list[Suggestion] = []
        for _ in range(2 * STEPS):
            while len(outstanding) < rng.integers(1, 6):
                outstanding += strategy.ask(1)
                calls.append(outstanding[-1])
            done = outstanding.pop(int(rng.integers(len(outstanding))))
            told = _result(done, problem, failed=bool(rng.random() < 0.2))
            told = replace(told, id=None) if rng.random() < 0.1 else told
            calls.append(told)
            strategy.tell([told])
        again = self._make(problem)
        for call in calls:
            if isinstance(call, TrialResult):
                again.tell([call])
            else:
                assert np.array_equal(again.ask(1)[0].point, call.point)
        assert np.array_equal(np.array(strategy.best()), np.array(again.best()))

    def test_another_budget_is_told_again_by_a_replay(self) -> None:
        """A strategy that plans by the budget has ``set_budget``; others go on as they are."""
        problem = self._problem(self.dims[0])
        courses = []
        for _ in range(2):
            strategy = self._make(problem)
            asked: list[Suggestion] = []
            for step in range(STEPS):
                if step == STEPS // 2:
                    tell_budget(strategy, 2 * problem.budget)
                asked += strategy.ask(1)
                self._check_inside(asked[-1].point, problem)
                strategy.tell([_result(asked[-1], problem)])
            courses.append(_points(asked))
        assert np.array_equal(courses[0], courses[1])

    def test_nothing_but_failures_does_not_stop_it(self) -> None:
        """Failures are told as None, never as numbers."""
        problem = self._problem(self.dims[0])
        strategy = self._make(problem)
        for _ in range(STEPS):
            suggestion = strategy.ask(1)[0]
            assert np.all(np.isfinite(suggestion.point))
            strategy.tell([_result(suggestion, problem, failed=True)])

    def test_it_recommends_only_what_it_declares(self) -> None:
        """``best`` is empty unless ``recommends``."""
        problem = self._problem(self.dims[0])
        strategy = self._make(problem)
        for _ in range(STEPS):
            strategy.tell([_result(strategy.ask(1)[0], problem)])
        assert strategy.recommends or not strategy.best()

    def test_an_unknown_option_is_refused_in_one_line(self) -> None:
        """Names of options are those of the constructor."""
        from mergesearch.merging import InputError

        with pytest.raises(InputError) as caught:
            check_options(self.name, {**self.options, "no_such_option": 1})
        assert "\n" not in str(caught.value)

    def _problem(self, dim: int) -> Problem:
        return box(dim, 2 if get_strategy_info(self.name).objectives == "several" else 1)

    def _make(self, problem: Problem, seed: int = 3) -> Strategy:
        return build_strategy(self.name, check_options(self.name, self.options), problem, seed)

    def _trace(self, seed: int) -> Point:
        problem = self._problem(self.dims[0])
        strategy = self._make(problem, seed)
        asked: list[Suggestion] = []
        for _ in range(STEPS):
            asked += strategy.ask(1)
            strategy.tell([_result(asked[-1], problem)])
        return _points(asked)

    def _check_inside(self, point: Point, problem: Problem) -> None:
        assert point.shape == (problem.dim,)
        assert np.all((point >= problem.lower) & (point <= problem.upper))


def _points(suggestions: Sequence[Suggestion]) -> Point:
    return np.array([suggestion.point for suggestion in suggestions])


def _result(suggestion: Suggestion, problem: Problem, *, failed: bool = False) -> TrialResult:
    """The result of a smooth problem with noise that the point alone decides."""
    point = suggestion.point
    if failed:
        return TrialResult(suggestion.id, point, None)
    distance = float(np.mean((point - problem.lower - 0.6 * problem.width) ** 2))
    losses = np.array([distance + 0.1 * index * point[0] for index in range(problem.objectives)])
    rng = np.random.default_rng(int(1e6 * abs(float(point.sum()))))
    items = {
        name: loss + 0.1 * rng.standard_normal(problem.items)
        for name, loss in zip(problem.names, losses, strict=True)
    }
    return TrialResult(suggestion.id, point, losses, items=items)
