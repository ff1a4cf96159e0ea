"""The portfolio: turns, what members are told, shares, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import TrialResult
from mergesearch.search.strategies.portfolio import Portfolio
from mergesearch.search.strategies.table import build_strategy, check_options
from tests.contracts.problems import box, result_at
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
