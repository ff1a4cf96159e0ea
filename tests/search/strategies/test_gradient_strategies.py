"""Gradient strategies beyond the contract: where they begin, converge, and what they promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators import Batch
from mergesearch.merging import Field, InputError, Layout, Recipe, Source
from mergesearch.search.strategies.base import Problem, Strategy, Suggestion, TrialResult
from mergesearch.search.strategies.expert_merging_pp import tensor_numbers
from mergesearch.search.strategies.frank_wolfe import FrankWolfe, Hull
from mergesearch.search.strategies.gradient_warm_cma import RANGE, step_scale
from mergesearch.search.strategies.parts.gradient_walks import ParallelWalks
from mergesearch.search.strategies.table import build_strategy, check_options
from mergesearch.search.workers.gradient_steps import GradientResult, take_gradient_steps
from mergesearch.spaces.spec import SpaceSpec, build_space

EXPERTS = ("a", "b", "c")
LAYOUT = Layout.build({f"h.{block}.w": ((4, 6), "float32") for block in range(2)})


def problem(
    granularity: str = "tensor", *, objectives: int = 1, budget: int = 200, **section: Any
) -> Problem:
    """Three experts with coefficients in a real space, and nothing known."""
    sources = tuple(Source(name, name) for name in EXPERTS)
    template = Recipe(
        Source("base", "base"), sources, "task_arithmetic", Field.constant(LAYOUT.size, np.zeros(3))
    )
    spec = SpaceSpec.model_validate({"granularity": granularity, "start": 0.3, **section})
    space = build_space(
        spec,
        template,
        LAYOUT,
        default_bounds=(0.0, 1.0),
        default_start=0.3,
        change_sums=lambda: np.array([[3.0, 1.0], [1.0, 1.0], [2.0, 1.0]]),
    )
    names = tuple(f"f{index}" for index in range(objectives))
    scale = np.tile([0.0, 1.0], (objectives, 1))
    weights = np.full(objectives, 1 / objectives)
    return Problem(
        *(
            space.lower,
            space.upper,
            np.full(space.start.size, 0.6),
            objectives,
            budget,
            scale,
            weights,
        ),
        names=names,
        space=space,
        origin=space.start,
        differentiable=names,
    )


class Bowls:
    """Rotated quadratics, one per objective, with exact gradients."""

    def __init__(
        self, dim: int, objectives: int = 1, seed: int = 0, low: float = 0.1, high: float = 0.9
    ) -> None:
        rng = np.random.default_rng(seed)
        self.centres = rng.uniform(low, high, (objectives, dim))
        self.hessians = []
        for _ in range(objectives):
            rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
            self.hessians.append((rotation * np.linspace(1, 5, dim)) @ rotation.T)

    def losses(self, point: np.ndarray) -> np.ndarray:
        return np.array(
            [
                (point - c) @ h @ (point - c)
                for c, h in zip(self.centres, self.hessians, strict=True)
            ]
        )

    def gradients(self, point: np.ndarray) -> np.ndarray:
        return np.array(
            [2 * h @ (point - c) for c, h in zip(self.centres, self.hessians, strict=True)]
        )

    def measure(self, suggestion: Suggestion) -> TrialResult:
        gradient_steps = suggestion.gradient_steps
        gradient_result = None

        def loss_and_gradient_at(point: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
            assert gradient_steps is not None
            weights = np.array(
                [gradient_steps.config.weights.get(f"f{i}", 0.0) for i in range(len(self.centres))]
            )
            return float(weights @ self.losses(point)), weights @ self.gradients(point)

        if gradient_steps is not None:
            gradient_result = take_gradient_steps(
                gradient_steps, suggestion.point, loss_and_gradient_at
            )
        losses = None if suggestion.items == 0 else self.losses(suggestion.point)
        return TrialResult(
            suggestion.id,
            suggestion.point,
            losses,
            evaluated=suggestion.items,
            gradient_result=gradient_result,
        )


def run(strategy: Strategy, bowls: Bowls, trials: int) -> list[Suggestion]:
    asked = []
    for _ in range(trials):
        suggestions = strategy.ask(1)
        if not suggestions:
            break
        asked += suggestions
        strategy.tell([bowls.measure(suggestions[0])])
    return asked


def make(name: str, given: Problem, **options: Any) -> Strategy:
    return build_strategy(name, check_options(name, options), given, 0)


GRADIENT: dict[str, dict[str, Any]] = {
    "adamerging": {"learning_rate": 0.02},
    "expert_merging": {"gamma": 0.0},
    "expert_merging_pp": {"gamma": 0.0},
    "frank_wolfe": {"variant": "soft", "learning_rate": 0.02},
    "gradient_warm_cma": {"learning_rate": 0.02},
}


@pytest.mark.parametrize("name", GRADIENT)
def test_they_arrive_at_the_minimum_of_a_bowl(name: str) -> None:
    given = problem("chunk" if name == "expert_merging_pp" else "tensor")
    bowls = Bowls(given.dim)
    strategy = make(name, given, **GRADIENT[name])
    run(strategy, bowls, 60)
    (best,) = strategy.best()
    assert bowls.losses(best)[0] < 1e-3 * bowls.losses(given.start)[0]


@pytest.mark.parametrize("name", ["adamerging", "expert_merging", "expert_merging_pp"])
def test_they_begin_where_the_study_says_not_at_the_best_anchor(name: str) -> None:
    given = problem()
    first = make(name, given).ask(1)[0]
    np.testing.assert_array_equal(first.point, given.origin)
    assert first.gradient_steps is not None


def test_it_follows_the_objectives_that_it_is_told_to() -> None:
    given = problem(objectives=2)
    bowls = Bowls(given.dim, 2)
    strategy = make("adamerging", given, objectives=["f1"], learning_rate=0.02)
    run(strategy, bowls, 60)
    np.testing.assert_allclose(strategy.best()[0], bowls.centres[1], atol=0.02)
    both = make("adamerging", given, learning_rate=0.02)
    run(both, bowls, 60)
    joint = np.linalg.solve(
        sum(bowls.hessians), sum(h @ c for h, c in zip(bowls.hessians, bowls.centres, strict=True))
    )
    if np.all((joint > 0) & (joint < 1)):
        np.testing.assert_allclose(both.best()[0], joint, atol=0.02)
    with pytest.raises(InputError, match="can follow"):
        make("adamerging", given, objectives=["accuracy"])


def test_shares_average_to_the_walk_of_one_worker() -> None:
    given = problem()
    bowls = Bowls(given.dim)
    alone, split = (
        make("adamerging", given, shares=s, steps=4, restarts_in_parallel=1, batch_size=0)
        for s in (1, 3)
    )
    whole = run(alone, bowls, 4)
    asked = run(split, bowls, 3 * 16)
    measured = [suggestion for suggestion in asked if suggestion.items is None]
    assert len(measured) == 4
    for one, other in zip(whole, measured, strict=True):
        np.testing.assert_allclose(one.point, other.point, rtol=0, atol=1e-12)


def test_with_one_walk_nothing_is_asked_until_the_result_is_in() -> None:
    given = problem()
    strategy = make("adamerging", given, restarts_in_parallel=1)
    (first,) = strategy.ask(3)
    assert strategy.ask(1) == []
    strategy.tell([Bowls(given.dim).measure(first)])
    assert len(strategy.ask(5)) == 1


def test_more_walks_have_other_rates_and_the_best_is_recommended() -> None:
    given = problem()
    bowls = Bowls(given.dim)
    strategy = make("adamerging", given, learning_rate=0.05)
    suggestions = strategy.ask(4)
    rates = [
        s.gradient_steps.config.learning_rate for s in suggestions if s.gradient_steps is not None
    ]
    assert len(set(rates)) == 4
    for _ in range(6):
        strategy.tell([bowls.measure(suggestion) for suggestion in suggestions])
        suggestions = strategy.ask(4)
    losses = [bowls.losses(suggestion.point)[0] for suggestion in suggestions]
    assert bowls.losses(strategy.best()[0])[0] <= 1.5 * min(losses)


def test_a_failed_step_is_taken_again_with_half_the_rate() -> None:
    given = problem()
    strategy = make("adamerging", given, restarts_in_parallel=1)
    (first,) = strategy.ask(1)
    strategy.tell([TrialResult(first.id, first.point, None)])
    (second,) = strategy.ask(1)
    np.testing.assert_array_equal(second.point, first.point)
    assert first.gradient_steps is not None
    assert second.gradient_steps is not None
    assert (
        second.gradient_steps.config.learning_rate == first.gradient_steps.config.learning_rate / 2
    )


def test_expert_merging_stays_near_its_start_the_more_gamma_weighs() -> None:
    given = problem()
    bowls = Bowls(given.dim)
    ends = []
    for gamma in (0.0, 3.0, 300.0):
        strategy = make("expert_merging", given, gamma=gamma, learning_rate=0.05)
        run(strategy, bowls, 30)
        ends.append(float(np.abs(strategy.best()[0] - given.origin).sum()))
    assert ends[0] > 1.5 * ends[1]
    assert ends[2] < 0.15


def test_chunks_move_as_one_first_and_by_themselves_later() -> None:
    given = problem("chunk", budget=10, chunks={"total": 3.0})
    numbers = tensor_numbers(given)
    assert len(np.unique(numbers)) < given.dim
    asked = run(
        make("expert_merging_pp", given, gamma=0.0, steps=3, whole=0.5), Bowls(given.dim), 10
    )

    def spread(point: np.ndarray) -> float:
        return max(float(np.ptp(point[numbers == number])) for number in np.unique(numbers))

    assert [spread(s.point) for s in asked[:6]] == [0.0] * 6
    assert spread(asked[7].point) > 1e-3


@pytest.mark.parametrize("workers", [1, 4, 8])
def test_chunks_are_refined_with_any_number_of_workers(workers: int) -> None:
    given = problem("chunk", budget=40, chunks={"total": 3.0})
    strategy = make("expert_merging_pp", given, gamma=0.0, steps=3, whole=0.5)
    assert isinstance(strategy, ParallelWalks)
    outstanding: list[Suggestion] = []
    for _ in range(given.budget):
        outstanding += strategy.ask(workers - len(outstanding))
        strategy.tell([Bowls(given.dim).measure(outstanding.pop(0))])
    assert len(strategy.walks) == workers
    numbers = tensor_numbers(given)
    for walk in strategy.walks:
        spread = [np.ptp(walk.point[numbers == number]) for number in np.unique(numbers)]
        assert max(spread) > 1e-3


class TestFrankWolfe:
    def test_the_oracle_is_the_vertex_with_the_smallest_inner_product(self) -> None:
        given = problem()
        rng = np.random.default_rng(1)
        for granularity, base in [
            ("layer", True),
            ("layer", False),
            ("task", True),
            ("task", False),
        ]:
            hull = Hull.of(given, base=base, granularity=granularity)  # type: ignore[arg-type]
            for _ in range(20):
                gradient = rng.standard_normal(given.dim)
                chosen = gradient @ hull.vertex(hull.choose(gradient))
                corners = [np.repeat(row, 2) for row in np.eye(3)] + ([np.zeros(6)] if base else [])
                if granularity == "task":
                    assert chosen == pytest.approx(min(gradient @ corner for corner in corners))
                else:
                    table = gradient.reshape(3, 2)
                    assert chosen == pytest.approx(
                        sum(min(*column, *([0.0] if base else [])) for column in table.T)
                    )

    def test_it_stays_in_the_hull_and_its_gap_bounds_the_distance_to_the_best(self) -> None:
        given = problem()
        bowls = Bowls(given.dim, low=0.0, high=0.3)
        strategy = make("frank_wolfe", given, batch_size=0)
        asked = run(strategy, bowls, 150)
        for suggestion in asked:
            table = suggestion.point.reshape(3, 2)
            assert np.all(table >= 0)
            assert np.all(table.sum(axis=0) <= 1 + 1e-12)
        inside = np.all(bowls.centres[0].reshape(3, 2).sum(axis=0) <= 1)
        assert inside, "the optimum must lie in the hull for this test"
        gaps = [suggestion.notes.get("gap before") for suggestion in asked]
        for before, gap in zip(asked, gaps[1:], strict=False):
            assert gap is not None
            assert gap >= bowls.losses(before.point)[0] - 1e-12  # the minimum is 0
        # Jaggi 2013, theorem 1: at most 2 C / (t + 2), C the curvature: 2 * largest eigenvalue *
        # diameter^2.
        diameter = 4.0
        for t, suggestion in enumerate(asked[1:], start=1):
            assert bowls.losses(suggestion.point)[0] <= 2 * (2 * 5.0 * diameter) / (t + 2)
        assert bowls.losses(strategy.best()[0])[0] < 0.05

    def test_it_ends_when_the_gap_is_small_enough(self) -> None:
        given = problem()
        bowls = Bowls(given.dim)
        bowls.centres[0] = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])  # a vertex
        strategy = make("frank_wolfe", given, gap=0.2)
        assert len(run(strategy, bowls, 100)) < 100

    def test_cosines_move_only_groups_that_have_a_descent(self) -> None:
        strategy = FrankWolfe(problem(), 0, oracle="cosine", restarts_in_parallel=1)
        (suggestion,) = strategy.ask(1)
        assert suggestion.gradient_steps is not None
        assert suggestion.gradient_steps.config.measure == "cosine"
        cosines = np.array(
            [0.5, -0.1, 0.2, -0.3, 0.1, 0.4]
        )  # group 0: none negative; group 1: expert b
        strategy.tell(
            [
                TrialResult(
                    0,
                    suggestion.point,
                    np.array([1.0]),
                    gradient_result=GradientResult((1.0,), gradient=cosines),
                )
            ]
        )
        moved = strategy.ask(1)[0].point.reshape(3, 2)
        np.testing.assert_array_equal(moved[:, 0], 1 / 3)
        np.testing.assert_allclose(moved[:, 1], [0, 1, 0], atol=1e-12)

    def test_soft_moves_only_vertices_that_an_objective_named(self) -> None:
        given = problem(objectives=2)
        bowls = Bowls(given.dim, 2)
        # Both objectives want expert a only.
        bowls.hessians = [np.eye(6)] * 2
        bowls.centres = np.array(
            [[0.5, 0.5, -0.5, -0.5, -0.5, -0.5], [0.7, 0.7, -0.5, -0.5, -0.5, -0.5]]
        )
        strategy = make(
            "frank_wolfe",
            given,
            variant="soft",
            steps=40,
            learning_rate=0.02,
            restarts_in_parallel=1,
        )
        run(strategy, bowls, 12)
        table = strategy.best()[0].reshape(3, 2)
        np.testing.assert_allclose(table[0], 0.6, atol=0.02)
        np.testing.assert_array_equal(table[1:], 0.0)


class TestWarmCma:
    def test_scale_is_the_inverse_root_of_the_second_moments_within_bounds(self) -> None:
        scale = step_scale(np.array([1.0, 4.0, 0.25, 0.0]))
        assert scale is not None
        np.testing.assert_allclose(scale, [1.0, 0.5, 2.0, 1.0])
        wide = step_scale(np.array([1e-12, 1.0, 1e12]))
        assert wide is not None
        np.testing.assert_allclose(wide, [RANGE, 1.0, 1 / RANGE])
        assert step_scale(np.zeros(3)) is None

    def test_the_warm_start_pays_in_many_dimensions(self) -> None:
        def level(name: str, **options: Any) -> float:
            results = []
            for seed in range(3):
                given = problem("chunk", chunks={"total": 12.0}, budget=150)
                bowls = Bowls(given.dim, seed=seed)
                strategy = build_strategy(name, check_options(name, options), given, seed)
                run(strategy, bowls, 150)
                results.append(bowls.losses(strategy.best()[0])[0])
            return float(np.median(results))

        assert level("gradient_warm_cma", learning_rate=0.02) < 0.1 * level("cma_es")


def test_an_objective_without_gradients_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"strategy\.objectives"):
        make("frank_wolfe", replace(problem(), differentiable=()), objectives=["f0"])
