"""Windows of coordinates from the top: which they are, what they hold, and where they lead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergesearch.merging import InputError, Layout
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.block_coordinate import (
    HALF,
    LEAST,
    BlockCoordinate,
    Window,
    coordinate_depths,
    windows_of,
)
from mergesearch.search.strategies.quadratic import Quadratic
from mergesearch.spaces import Space
from mergesearch.spaces.spec import SpaceSpec, build_space
from tests.search.strategies.populations import asked, box, make, run, sphere
from tests.spaces.test_spec import template

BLOCKS = 8
NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{block}.{name}.weight"
        for block in range(BLOCKS)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    ),
    "model.norm.weight",
    "lm_head.weight",
]
LAYOUT = Layout.build(dict.fromkeys(NAMES, ((4, 5), "float32")))


def problem_of(**section: Any) -> Problem:
    """The problem of a space of two experts over eight blocks."""
    space: Space = build_space(
        SpaceSpec(**section),
        template(LAYOUT.size),
        LAYOUT,
        default_bounds=(0.0, 1.0),
        default_start=0.3,
    )
    plain = box(space.lower.size, budget=100)
    return replace(plain, lower=space.lower, upper=space.upper, start=space.start, space=space)


def names_in(problem: Problem, window: np.ndarray) -> set[str]:
    assert problem.space is not None
    return {problem.space.names[index].partition("/")[2] for index in window}


def test_windows_are_quarters_of_the_blocks_of_all_experts() -> None:
    problem = problem_of(granularity="block")
    windows = windows_of(problem, 4)
    assert [names_in(problem, window) for window in windows] == [
        {"block 6", "block 7", "final", "head"},
        {"block 4", "block 5"},
        {"block 2", "block 3"},
        {"block 0", "block 1", "embedding"},
    ]
    assert sorted(np.concatenate(windows)) == list(range(problem.dim))


@pytest.mark.parametrize("granularity", ["block_module", "tensor"])
def test_all_of_a_block_is_in_one_window(granularity: str) -> None:
    problem = problem_of(granularity=granularity)
    top = names_in(problem, windows_of(problem, BLOCKS)[0])
    assert any("mlp" in name for name in top)
    assert all(any(word in name for word in ("7", "final", "norm", "head")) for name in top)


def test_what_acts_everywhere_is_moved_with_the_lowest_blocks() -> None:
    problem = problem_of(depth={"basis": "dct"})
    assert problem.space is not None
    depths = dict(
        zip(problem.space.names, coordinate_depths(problem.space, problem.dim), strict=True)
    )
    above = {name for name in depths if "final" in name or "head" in name}
    assert {depths[name] for name in above} == {1.0}
    assert {depths[name] for name in set(depths) - above} == {0.0}


def test_coefficients_without_a_depth_are_refused() -> None:
    with pytest.raises(InputError, match="coefficients that differ with depth"):
        windows_of(problem_of(granularity="task"), 4)
    problem = problem_of(granularity="block")
    other: Any = type("Other", (), {"title": "segment"})()
    with pytest.raises(InputError, match="received a segment space"):
        windows_of(replace(problem, space=other), 4)


def test_coordinates_below_a_window_keep_their_bits() -> None:
    problem = problem_of(granularity="block")
    points = asked(make("block_coordinate", problem, first=0.2), sphere, 100)
    windows = windows_of(problem, 4)
    length = (100 - 20) // 4
    for number, window in enumerate(windows):
        part = points[20 + number * length : 20 + (number + 1) * length]
        others = np.setdiff1d(np.arange(problem.dim), window)
        assert np.all(part[:, others] == part[0, others])
        assert all(len(set(column)) > 1 for column in part[:, window].T)


def test_a_window_begins_at_the_best_that_is_known_and_is_searched_as_a_problem_of_its_own() -> (
    None
):
    problem = replace(box(6, budget=40), start=np.full(6, 0.5))
    strategy = BlockCoordinate(problem, 5, first=0.25, windows=2)
    first = Quadratic(replace(problem, budget=10), 5)
    trials = []
    for _ in range(10):
        suggestion = strategy.ask(1)[0]
        assert np.array_equal(suggestion.point, first.ask(1)[0].point)
        trials.append(TrialResult(suggestion.id, suggestion.point, sphere(suggestion.point)))
        for each in (strategy, first):
            each.tell(trials[-1:])
    best = min(trials, key=lambda trial: float(trial.losses[0]))
    window = Window(problem, np.array([3, 4, 5]), best.point, HALF)
    rng = np.random.default_rng(5)
    reference = Quadratic(window.problem(15, trials), int(rng.integers(2**32)))
    for _ in range(15):
        ours = strategy.ask(1)[0]
        theirs = reference.ask(1)[0]
        assert np.array_equal(ours.point, window.outside(theirs.point))
        assert ours.notes == {"window": 0.0}
        losses = sphere(ours.point)
        strategy.tell([TrialResult(ours.id, ours.point, losses)])
        reference.tell([TrialResult(theirs.id, theirs.point, losses)])


def test_sweeps_are_those_of_exact_descent_where_windows_depend_on_each_other() -> None:
    """Reference: the minimum of each window in turn, in closed form.

    With the error e of the lower half, the upper window leaves 4 e², and the lower one then halves
    e and leaves 2 e².
    """

    def coupled(point: np.ndarray) -> np.ndarray:
        lower, upper = point[:4], point[4:]
        return np.array([np.sum((lower - 0.6) ** 2) + np.sum((upper - lower + 0.1) ** 2)])

    strategy = make("block_coordinate", box(8, budget=120), first=0.0, windows=2)
    losses = run(strategy, coupled, 240)
    windows = [float(losses[:end].min()) for end in (60, 120, 180, 240)]
    assert windows == pytest.approx([0.36, 0.18, 0.09, 0.045], rel=0.02)


def test_late_results_count_for_their_own_window() -> None:
    problem = box(8, budget=80)
    strategy = make("block_coordinate", problem, first=0.0, windows=4)
    late = strategy.ask(20 + LEAST)  # the second window has begun
    strategy.tell([TrialResult(each.id, each.point, sphere(each.point)) for each in late])
    assert {each.notes["window"] for each in late} == {0.0, 1.0}
    assert len(strategy.best()) == 1


def test_a_larger_budget_lengthens_the_first_stage() -> None:
    problem = problem_of(granularity="block")
    strategy = BlockCoordinate(problem, 0)
    strategy.set_budget(200)
    notes = [bool(each.notes) for each in strategy.ask(101)]
    assert notes == [False] * 100 + [True]
