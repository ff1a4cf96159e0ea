"""The portfolio: turns, what members are told, shares, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Suggestion, TrialResult
from mergesearch.search.strategies.portfolio import LEAST, REPEATS, Portfolio, leading
from mergesearch.search.strategies.table import (
    build_strategy,
    check_options,
    get_strategy_info,
)
from tests.contracts.problems import box, gradient_result, result_at
from tests.search.studies import analytic, run_in


def portfolio(members: list, dim: int = 5, objectives: int = 1) -> Portfolio:
    built = build_strategy(
        "portfolio", check_options("portfolio", {"members": members}), box(dim, objectives), 4
    )
    assert isinstance(built, Portfolio)
    return built


def test_turns_are_taken_in_proportion_to_shares() -> None:
    strategy = portfolio([{"name": "sobol", "share": 3}, "cma_es"])
    strategy.ask(40)
    owners = [member for member, _ in strategy._book.outstanding]
    assert owners[:8] == [0, 1, 0, 0, 0, 1, 0, 0] or owners[:8].count(0) == 6
    assert (owners.count(0), owners.count(1)) == (30, 10)


def test_members_propose_what_they_would_alone() -> None:
    """A member behaves as the strategy by itself.

    It is told its own trials as its own, and those of others as nobody's.
    """
    problem = box(5)
    both = portfolio(["cma_es", {"name": "sobol", "sigma": 0.1}])
    alone = build_strategy(
        "cma_es",
        check_options("cma_es", {}),
        replace(problem, budget=100),
        int(np.random.SeedSequence(4).generate_state(2)[0]),
    )
    for _ in range(60):
        suggestion = both.ask(1)[0]
        mine = both._book.outstanding[-1][0] == 0
        if mine:
            expected = alone.ask(1)[0]
            assert np.array_equal(suggestion.point, expected.point)
            alone.tell([result_at(expected.point, problem, expected.id)])
        else:
            alone.tell([result_at(suggestion.point, problem)])
        both.tell([result_at(suggestion.point, problem, suggestion.id)])


def test_others_are_told_of_a_trial_as_of_one_they_did_not_suggest() -> None:
    strategy = portfolio(["cma_es", "sobol"])
    heard: list[list[int | None]] = [[], []]
    for number, member in enumerate(strategy._members):
        member.tell = lambda trials, number=number: heard[number].extend(t.id for t in trials)  # type: ignore[method-assign]
    suggestions = strategy.ask(4)
    strategy.tell([result_at(s.point, box(5), s.id) for s in reversed(suggestions)])
    strategy.tell([TrialResult(None, suggestions[0].point, np.zeros(1))])
    assert heard == [[None, 1, None, 0, None], [1, None, 0, None, None]]


def test_gradient_steps_of_members_are_passed_on() -> None:
    """Each trial of a walk begins where the one before has led, and none repeats the start."""
    problem = replace(box(5), names=("f0",), differentiable=("f0",))
    options = check_options("portfolio", {"members": ["adamerging", "cma_es"]})
    strategy = build_strategy("portfolio", options, problem, 0)
    walked = []
    for _ in range(20):
        suggestion = strategy.ask(1)[0]
        result = result_at(suggestion.point, problem, suggestion.id)
        if suggestion.gradient_steps is not None:
            walked.append(suggestion.point)
            result = replace(result, gradient_result=gradient_result(suggestion, problem))
        strategy.tell([result])
    assert len(walked) >= 8
    assert len(np.unique(walked, axis=0)) == len(walked)


def test_a_portfolio_needs_what_its_members_need() -> None:
    needs = get_strategy_info("portfolio").needs_with
    assert needs({}) == frozenset()
    assert needs({"members": ["cma_es", {"name": "adamerging"}]}) == {"gradient"}


class Stubborn:
    """Asks for one point again and again, and remembers what it is told of it."""

    def __init__(self, point: np.ndarray, items: int | None = None) -> None:
        self.point = point
        self.items = items
        self.asked = 0
        self.told: list[TrialResult] = []

    def ask(self, count: int) -> list[Suggestion]:
        self.asked += count
        return [Suggestion(self.asked - 1, self.point, self.items)] * count

    def tell(self, trials: list[TrialResult]) -> None:
        self.told += [trial for trial in trials if trial.id is not None]

    def best(self) -> list[np.ndarray]:
        return []


def test_a_measured_point_is_answered_from_the_record() -> None:
    problem = box(5)
    strategy = portfolio(["cma_es", "sobol"])
    whole = Stubborn(problem.start)
    part = Stubborn(problem.start, items=3)
    strategy._members = [whole, part]  # type: ignore[list-item]
    first, second = strategy.ask(2)
    strategy.tell([result_at(first.point, problem, first.id)])
    assert second.items == 3
    again, other = strategy.ask(2)
    assert again.items is None  # one that asks for nothing else is given a trial in the end
    assert other.items == 3  # a result on all items says nothing of its own
    known = [trial for trial in whole.told if trial.id]
    assert [trial.id for trial in known] == list(range(1, REPEATS + 1))
    assert all(np.array_equal(trial.losses, whole.told[0].losses) for trial in known)


def test_a_point_that_failed_is_measured_again() -> None:
    problem = box(5)
    strategy = portfolio(["cma_es"])
    stubborn = Stubborn(problem.start)
    strategy._members = [stubborn]  # type: ignore[list-item]
    failed = strategy.ask(1)[0]
    strategy.tell([result_at(failed.point, problem, failed.id, failed=True)])
    assert len(strategy.ask(1)) == 1
    assert stubborn.asked == 2


def test_weak_members_are_starved_and_never_left_out() -> None:
    problem = replace(box(12), budget=400)
    strategy = build_strategy("portfolio", {"members": ["sobol", "cma_es"]}, problem, 0)
    assert isinstance(strategy, Portfolio)
    owners = []
    for _ in range(300):
        suggestion = strategy.ask(1)[0]
        owners.append(strategy._book.outstanding[-1][0])
        strategy.tell([result_at(suggestion.point, problem, suggestion.id)])
    assert owners[: 2 * LEAST].count(0) == LEAST
    assert 3 <= owners[100:].count(0) < 40


def test_leading_trials_are_the_best_tenth_or_whole_fronts() -> None:
    losses = np.array([[np.inf], *np.arange(19.0)[:, None]])
    assert np.flatnonzero(leading(losses, box(2))).tolist() == [1, 2]
    fronts = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [3.0, 3.0]])
    assert leading(fronts, box(2, 2)).tolist() == [True, True, False, False]
    assert not leading(np.full((3, 1), np.inf), box(2)).any()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([{"sigma": 1}], "expected the name of a strategy"),
        (["auto"], "expected the name of a strategy that searches by itself"),
        (["cma_se"], "did you mean 'cma_es'"),
        ([{"name": "cma_es", "sigm": 0.1}], "strategy.sigm: unknown option of cma_es"),
        ([{"name": "cma_es", "share": 0}], "cma_es: expected a positive share, received 0"),
        (["m2n2"], "m2n2 searches a space of its own and cannot share a log"),
    ],
)
def test_wrong_members_are_refused_in_one_line(members: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        portfolio(members)


def test_one_study_one_log(tmp_path: Path) -> None:
    data = analytic(trials=40, strategy={"name": "portfolio", "members": ["cma_es", "sobol"]})
    run = run_in(data, tmp_path / "run")
    assert [r.suggestion for r in run.log.records if r.kind == "search"] == list(range(38))
    assert run.verdict is not None
