"""Strategies that plan by the budget, told of another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergesearch.search.strategies.base import Problem, Strategy, tell_budget
from mergesearch.search.strategies.table import build_strategy, check_options
from tests.contracts.problems import make_problem
from tests.contracts.test_strategies import points, result

#: Strategy, its options, objectives, and the results after which it is told of 60 suggestions
#: instead of 12. Its course is then another one.
TOLD = [
    ("evo_merging", {"population": 4}, 1, 2),
    ("gradient_warm_cma", {"population": 4}, 1, 2),
    ("map", {}, 2, 1),
    ("bayesian_map", {"initial": 3}, 2, 5),
    ("nsga2", {}, 2, 8),
    ("sms_emoa", {}, 2, 8),
    ("portfolio", {"members": ["map", "nsga2"]}, 2, 1),
    ("expert_merging_pp", {}, 1, 3),
]


def course(problem: Problem, make: Strategy, told: int, budget: int | None) -> np.ndarray:
    """Forty points, with the budget told after so many results."""
    asked = []
    for step in range(40):
        if step == told and budget is not None:
            tell_budget(make, budget)
        asked += make.ask(1)
        make.tell([result(asked[-1], problem)])
    return points(asked)


@pytest.mark.parametrize(("name", "options", "objectives", "told"), TOLD)
def test_a_larger_budget_changes_the_course_from_there_on(
    name: str, options: Mapping[str, Any], objectives: int, told: int
) -> None:
    problem = replace(make_problem(name, 6, objectives), budget=12)

    def strategy() -> Strategy:
        return build_strategy(name, check_options(name, options), problem, 3)

    before = course(problem, strategy(), told, None)
    same = course(problem, strategy(), told, 12)
    larger = course(problem, strategy(), told, 60)
    assert np.array_equal(same, before)
    assert np.array_equal(larger[:told], before[:told])
    assert not np.array_equal(larger, before)
