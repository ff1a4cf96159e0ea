"""The contract of strategies, on every entry of ``STRATEGIES``.

Every member must pass at every dimension below, or refuse one with a clear :class:`InputError`.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import (
    Problem,
    Strategy,
    Suggestion,
    TrialResult,
    tell_budget,
)
from mergesearch.search.strategies.table import STRATEGIES, build_strategy, check_options
from tests.contracts.problems import MARKED_CASES, gradient_result, make_problem, result_at

DIMENSIONS = [
    *(1, 2, 40, 2000),
    *(pytest.param(dim, marks=pytest.mark.slow) for dim in (7, 300)),
]
#: Asks and tells of a test; fewer where one takes long.
STEPS = 30
SLOW_STEPS = 12
SLOW = ("medsamix", "optuna")


def make(name: str, options: dict, problem: Problem, seed: int = 3) -> Strategy:
    """The strategy, or a skip where it refuses the problem in one clear line."""
    reason = ""
    try:
        return build_strategy(name, check_options(name, options), problem, seed)
    except InputError as error:
        reason = str(error)
    assert reason.startswith("strategy")
    assert "\n" not in reason
    assert not _is_sensible(name, problem), f"{name} refuses what it is listed for: {reason}"
    pytest.skip(f"refused: {reason}")


def _is_sensible(name: str, problem: Problem) -> bool:
    low, high = STRATEGIES[name].dims
    wanted = STRATEGIES[name].objectives
    fits = wanted == "any" or (problem.objectives > 1) == (wanted == "several")
    return fits and low <= problem.dim <= (np.inf if high is None else high)


def default_objectives(name: str) -> int:
    return 2 if STRATEGIES[name].objectives == "several" else 1


def result(suggestion: Suggestion, problem: Problem, *, failed: bool = False) -> TrialResult:
    """The result that a study would tell for a suggestion, on the items that it asks for."""
    whole = result_at(suggestion.point, problem, suggestion.id, failed=failed)
    if not failed:
        whole = replace(whole, gradient_result=gradient_result(suggestion, problem))
    if suggestion.items is None or failed:
        return whole
    if suggestion.items == 0:
        assert suggestion.gradient_steps is not None, (
            "a trial that is neither evaluated nor descends"
        )
        return replace(whole, losses=None, items={}, evaluated=0)
    assert 1 <= suggestion.items <= problem.items
    items = {name: scores[: suggestion.items] for name, scores in whole.items.items()}
    return replace(whole, items=items, evaluated=suggestion.items)


def points(suggestions: list[Suggestion]) -> np.ndarray:
    return np.array([suggestion.point for suggestion in suggestions])


def steps(name: str) -> int:
    return SLOW_STEPS if name in SLOW else STEPS


@pytest.mark.parametrize(
    ("name", "options"),
    MARKED_CASES,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
class TestStrategyContract:
    def problem(self, name: str, dim: int, objectives: int | None = None) -> Problem:
        return make_problem(name, dim, objectives or default_objectives(name))

    @pytest.mark.parametrize("dim", DIMENSIONS)
    def test_points_lie_in_the_box_at_any_dimension(
        self, name: str, options: dict, dim: int
    ) -> None:
        problem = self.problem(name, dim)
        strategy = make(name, options, problem)
        for _ in range(steps(name) if dim < 1000 else SLOW_STEPS):
            suggestions = strategy.ask(2)
            assert [s.point.shape for s in suggestions] == [(problem.dim,)] * 2
            assert np.all(points(suggestions) >= problem.lower)
            assert np.all(points(suggestions) <= problem.upper)
            strategy.tell([result(s, problem) for s in suggestions])
        for point in strategy.best():
            assert np.all((point >= problem.lower) & (point <= problem.upper))

    def test_more_dimensions_than_it_can_bear_are_refused(self, name: str, options: dict) -> None:
        most = STRATEGIES[name].most
        if most is None:
            pytest.skip("bears any")
        with pytest.raises(InputError, match=f"{most}"):
            build_strategy(name, check_options(name, options), self.problem(name, most + 1), 3)

    def test_ids_count_from_zero(self, name: str, options: dict) -> None:
        strategy = make(name, options, self.problem(name, 4))
        assert [s.id for s in strategy.ask(3) + strategy.ask(2)] == [0, 1, 2, 3, 4]

    def test_asking_for_several_equals_asking_one_by_one(self, name: str, options: dict) -> None:
        problem = self.problem(name, 6)
        together = make(name, options, problem)
        single = make(name, options, problem)
        for _ in range(6):
            batch = together.ask(4)
            singles = [single.ask(1)[0] for _ in range(4)]
            assert np.array_equal(points(batch), points(singles))
            together.tell([result(s, problem) for s in batch])
            for suggestion in singles:
                single.tell([result(suggestion, problem)])

    def test_same_seed_same_points_other_seed_other_points(self, name: str, options: dict) -> None:
        problem = self.problem(name, 6)
        traces = [self._trace(name, options, problem, seed) for seed in (1, 1, 2)]
        assert np.array_equal(traces[0], traces[1])
        assert not np.array_equal(traces[0], traces[2])

    def test_global_generators_are_neither_read_nor_written(self, name: str, options: dict) -> None:
        problem = self.problem(name, 4)
        before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002  # the state under test
        reference = self._trace(name, options, problem)
        assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
        assert random.getstate() == before[1]
        np.random.seed(123)  # noqa: NPY002
        random.seed(123)
        assert np.array_equal(self._trace(name, options, problem), reference)

    def _trace(self, name: str, options: dict, problem: Problem, seed: int = 3) -> np.ndarray:
        strategy = make(name, options, problem, seed)
        asked = []
        for _ in range(steps(name) + 10):
            asked += strategy.ask(1)
            strategy.tell([result(asked[-1], problem)])
        return points(asked)

    @pytest.mark.parametrize("dim", [1, 10, 260])
    def test_replay_of_an_asynchronous_run_is_exact(
        self, name: str, options: dict, dim: int
    ) -> None:
        """The same calls give the same points.

        Results are out of order, some failed, some of others, with up to seven outstanding.
        """
        rng = np.random.default_rng(0)
        problem = self.problem(name, dim)
        strategy = make(name, options, problem)
        calls: list[Suggestion | TrialResult] = []
        outstanding: list[Suggestion] = []
        for _ in range(2 * steps(name)):
            while len(outstanding) < rng.integers(1, 8):
                outstanding += strategy.ask(1)
                calls.append(outstanding[-1])
            done = outstanding.pop(int(rng.integers(len(outstanding))))
            calls.append(result(done, problem, failed=bool(rng.random() < 0.2)))
            if rng.random() < 0.1:
                calls[-1] = replace(calls[-1], id=None)
            strategy.tell([calls[-1]])
        again = make(name, options, problem)
        for call in calls:
            if isinstance(call, TrialResult):
                again.tell([call])
            else:
                assert np.array_equal(again.ask(1)[0].point, call.point)
        assert np.array_equal(np.array(strategy.best()), np.array(again.best()))

    def test_another_budget_is_taken_at_any_time_and_replay_tells_it_again(
        self, name: str, options: dict
    ) -> None:
        if not hasattr(STRATEGIES[name].load(), "set_budget"):
            pytest.skip("does not plan by the budget")
        problem = replace(self.problem(name, 6), budget=12)

        def trace(*places: int) -> np.ndarray:
            strategy = make(name, options, problem)
            asked = []
            for step in range(16):
                if step in places:
                    tell_budget(strategy, 12 + 4 * step)
                asked += strategy.ask(1)
                strategy.tell([result(asked[-1], problem)])
            return points(asked)

        several = trace(2, 12)
        assert np.array_equal(several, trace(2, 12))
        assert np.array_equal(several[:2], trace()[:2])
        assert np.all((several >= problem.lower) & (several <= problem.upper))

    def test_results_that_nobody_asked_for_are_accepted(self, name: str, options: dict) -> None:
        problem = self.problem(name, 6)
        strategy = make(name, options, problem)
        rng = np.random.default_rng(5)
        for _ in range(steps(name)):
            other = (
                problem.lower + rng.random(problem.dim) * problem.width
                if problem.space is None
                else problem.start
            )
            strategy.tell([result_at(other, problem)])
            suggestion = strategy.ask(1)[0]
            strategy.tell([result(suggestion, problem)])

    def test_nothing_but_failures_does_not_stop_it(self, name: str, options: dict) -> None:
        problem = replace(self.problem(name, 8), anchors=())
        strategy = make(name, options, problem)
        for _ in range(steps(name) + 20):
            suggestion = strategy.ask(1)[0]
            assert np.all(np.isfinite(suggestion.point))
            strategy.tell([result(suggestion, problem, failed=True)])

    def test_a_space_of_a_single_point(self, name: str, options: dict) -> None:
        problem = self.problem(name, 4)
        if problem.space is not None:
            pytest.skip("its space always has more than one point")
        anchors = tuple(result_at(problem.lower, problem) for _ in range(2))
        point = replace(
            problem, upper=problem.lower, start=problem.lower, budget=5, anchors=anchors
        )
        strategy = make(name, options, point)
        for _ in range(5):
            suggestion = strategy.ask(1)[0]
            assert np.array_equal(suggestion.point, problem.lower)
            strategy.tell([result(suggestion, point)])

    def test_a_fixed_coordinate_stays_fixed(self, name: str, options: dict) -> None:
        problem = self.problem(name, 4)
        if problem.space is not None:
            pytest.skip("its space has no fixed coordinates")
        upper = problem.upper.copy()
        upper[2] = problem.lower[2]
        anchors = tuple(
            result_at(np.minimum(anchor.point, upper), problem) for anchor in problem.anchors
        )
        fixed = replace(
            problem, upper=upper, start=np.minimum(problem.start, upper), anchors=anchors
        )
        strategy = make(name, options, fixed)
        for _ in range(steps(name)):
            suggestion = strategy.ask(1)[0]
            assert suggestion.point[2] == problem.lower[2]
            strategy.tell([result(suggestion, fixed)])

    @pytest.mark.parametrize("objectives", [1, 3])
    def test_other_numbers_of_objectives(self, name: str, options: dict, objectives: int) -> None:
        problem = self.problem(name, 6, objectives)
        strategy = make(name, options, problem)
        for _ in range(steps(name)):
            suggestion = strategy.ask(1)[0]
            strategy.tell([result(suggestion, problem)])
        assert len(strategy.ask(2)) == 2

    def test_recommends_only_what_it_declares(self, name: str, options: dict) -> None:
        problem = self.problem(name, 4)
        strategy = make(name, options, problem)
        for _ in range(steps(name)):
            strategy.tell([result(strategy.ask(1)[0], problem)])
        assert strategy.recommends or not strategy.best()
