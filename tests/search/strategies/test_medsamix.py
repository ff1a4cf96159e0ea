"""MedSAMix beyond the contract: rungs, promotions, scalarisation, forest, conditions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.operators.stack import prepare
from mergesearch.search.strategies.base import Problem, Strategy, Suggestion, TrialResult
from mergesearch.search.strategies.medsamix import MedSaMix
from mergesearch.search.strategies.parts.configurations import ConfigurationSpace
from mergesearch.search.strategies.parts.random_forest import (
    Forest,
    Results,
    augmented_tchebycheff,
    expected_improvement,
    scale_losses,
    simplex_weights,
)
from mergesearch.search.strategies.parts.rungs import bracket_rungs, rungs_of
from mergesearch.search.strategies.sobol import Sobol
from tests.contracts.problems import box, mixed

Function = Callable[[np.ndarray], float]


def hidden_merge(dim: int, seed: int) -> tuple[Problem, Function]:
    """A problem, and the squared distance of a point's merged weights to hidden ones.

    The hidden point has methods of its own.
    """
    problem = replace(mixed(dim), items=0, budget=200)
    layout = problem.space.layout
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(8, 8, generator=generator) for name in layout.names}
    tuned = [
        {n: t + 0.3 * torch.randn(8, 8, generator=generator) for n, t in base.items()}
        for _ in range(2)
    ]
    first, *others = (
        MappingSource(str(k), state, layout.names) for k, state in enumerate((base, *tuned))
    )
    basis = prepare(first, others)
    rows = torch.stack([torch.stack(basis.rows(name)).flatten(1) for name in layout.names]).double()
    products = (rows @ rows.transpose(1, 2)).numpy()
    starts = np.array([spec.start for spec in layout.tensors])
    wanted = np.random.default_rng(seed).uniform(problem.lower, problem.upper)
    target = problem.space.field(wanted).at(starts)

    def distance(point: np.ndarray) -> float:
        error = problem.space.field(point).at(starts) - target
        return float(np.einsum("kt,tkl,lt->", error, products, error))

    return problem, distance


def bowl(point: np.ndarray) -> float:
    return float(np.mean((point - 0.2) ** 2))


def result(suggestion: Suggestion, *losses: float) -> TrialResult:
    return TrialResult(
        suggestion.id, suggestion.point, np.array(losses), evaluated=suggestion.items
    )


def minimise(strategy: Strategy, function: Function, trials: int) -> float:
    best = math.inf
    for _ in range(trials):
        suggestion = strategy.ask(1)[0]
        value = function(suggestion.point)
        strategy.tell([result(suggestion, value)])
        best = min(best, value)
    return best


class TestSearch:
    def test_beats_random_on_conditional_dimensions(self) -> None:
        ratios = []
        for seed in range(3):
            problem, function = hidden_merge(44, seed)
            ours = minimise(MedSaMix(problem, seed, trees=15), function, 90)
            ratios.append(ours / minimise(Sobol(problem, seed), function, 90))
        assert np.exp(np.mean(np.log(ratios))) < 0.75

    def test_converges_on_a_plain_box(self) -> None:
        problem = _plain(4)
        ratios = [
            minimise(MedSaMix(problem, seed, trees=15), bowl, 120) / bowl(problem.start)
            for seed in range(3)
        ]
        assert np.exp(np.mean(np.log(ratios))) < 0.06

    def test_finds_a_front(self) -> None:
        weights = np.linspace(0.5, 1.5, 6)

        def losses(point: np.ndarray) -> tuple[float, float]:
            return float(np.mean(weights * (point - 0.1) ** 2)), float(np.mean((point - 0.6) ** 2))

        volumes = []
        for strategy in (MedSaMix(_plain(6, 2), 1, trees=15), Sobol(_plain(6, 2), 1)):
            measured = []
            for _ in range(100):
                suggestion = strategy.ask(1)[0]
                measured.append(losses(suggestion.point))
                strategy.tell([result(suggestion, *measured[-1])])
            volumes.append(_volume(measured, 0.25))
        # The whole front has f2 = (0.5 − √f1)², were all weights 1, and then the volume 0.0625 −
        # 1/96.
        assert volumes[0] > max(5 * volumes[1], 0.4 * (0.0625 - 1 / 96))


def _plain(dim: int, objectives: int = 1) -> Problem:
    """The unit box, with a start that is far from all that is of interest."""
    problem = replace(box(dim, objectives), items=0)
    return replace(problem, lower=np.zeros(dim), upper=np.ones(dim), start=np.full(dim, 0.8))


def _volume(points: list[tuple[float, float]], reference: float) -> float:
    """Area that points dominate, below the reference in both objectives."""
    area = 0.0
    height = reference
    for one, other in sorted(point for point in points if max(point) < reference):
        if other < height:
            area = area + (reference - one) * (height - other)
            height = other
    return area


class TestBeginning:
    def test_begins_with_the_start_and_every_expert(self) -> None:
        problem = mixed(44)
        first = [s.point for s in MedSaMix(problem, 0).ask(3)]
        for point, expected in zip(first, (problem.start, *problem.space.seeds), strict=True):
            assert np.array_equal(point, expected)

    def test_what_anchors_have_shown_is_not_tried_again(self) -> None:
        problem = mixed(44)
        known = (
            TrialResult(None, problem.start, np.ones(1)),
            TrialResult(None, problem.space.seeds[0], np.ones(1)),
        )
        points = [s.point for s in MedSaMix(replace(problem, anchors=known), 0).ask(30)]
        assert np.array_equal(points[0], problem.space.seeds[1])
        assert not any(np.array_equal(point, anchor.point) for point in points for anchor in known)

    def test_nothing_is_tried_twice(self) -> None:
        problem, function = hidden_merge(44, 0)
        strategy = MedSaMix(problem, 0, trees=5)
        seen = set()
        for _ in range(60):
            suggestion = strategy.ask(1)[0]
            assert suggestion.point.tobytes() not in seen
            seen.add(suggestion.point.tobytes())
            strategy.tell([result(suggestion, function(suggestion.point))])

    @pytest.mark.parametrize("fixed", [slice(0, 4), slice(2, 3)])
    def test_fixed_coordinates_of_a_plain_box(self, fixed: slice) -> None:
        problem = box(4)
        upper = problem.upper.copy()
        upper[fixed] = problem.lower[fixed]
        problem = replace(problem, upper=upper, start=np.minimum(problem.start, upper))
        strategy = MedSaMix(problem, 0, trees=5)
        for _ in range(20):
            suggestion = strategy.ask(1)[0]
            assert np.array_equal(suggestion.point[fixed], problem.lower[fixed])
            strategy.tell([result(suggestion, bowl(suggestion.point))])


class TestConditions:
    def test_inactive_coordinates_are_never_moved(self) -> None:
        problem, function = hidden_merge(66, 0)
        middle = np.array([dimension.middle for dimension in problem.space.dimensions])
        strategy = MedSaMix(problem, 0, trees=5)
        for _ in range(40):
            point = strategy.ask(1)[0].point
            active = problem.space.active(point)
            assert not active.all()
            assert np.array_equal(point[~active], middle[~active])
            strategy.tell([TrialResult(None, point, np.array([function(point)]))])

    def test_neighbours_differ_in_what_matters(self) -> None:
        problem = mixed(66)
        moves = ConfigurationSpace(problem, np.random.default_rng(0))
        parents = moves.scattered(4)
        children = moves.neighbours(np.repeat(parents, 1, axis=0), 200)
        digests = {problem.space.decode(parent).digest for parent in parents}
        assert np.array_equal(moves.canonical(children), children)
        changed = [problem.space.decode(child).digest not in digests for child in children]
        # A step may end in the same fold of an arc, or be of the least score of three; hardly ever.
        assert np.mean(changed) > 0.95
        nearest = [min(int(np.sum(child != parent)) for parent in parents) for child in children]
        assert min(nearest) == 1
        assert max(nearest) > 15

    def test_every_choice_can_be_reached_from_every_other(self) -> None:
        problem = mixed(8)
        moves = ConfigurationSpace(problem, np.random.default_rng(0))
        index = problem.space.choices[0]
        reached: Counter[tuple[float, float]] = Counter()
        for parent in moves.scattered(40):
            reached.update(
                (parent[index], child[index]) for child in moves.neighbours(parent[None], 40)
            )
        assert {pair for pair in reached if pair[0] != pair[1]} == set(
            itertools.permutations([0.5, 1.5, 2.5, 3.5], 2)
        )

    def test_forest_sees_a_column_for_each_name(self) -> None:
        problem = mixed(8)
        moves = ConfigurationSpace(problem, np.random.default_rng(0))
        columns = moves.features(np.array([problem.start, problem.space.seeds[0]]))
        assert columns.shape == (2, problem.dim - 1 + 4)
        assert columns[:, -4:].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
        assert np.all((columns >= 0) & (columns <= 1))

    def test_candidates_are_bounded(self) -> None:
        sizes = {
            dim: ConfigurationSpace(box(dim), np.random.default_rng(0)).size
            for dim in (1, 40, 2000)
        }
        assert sizes == {1: 300, 40: 300, 2000: 75}


class TestRungs:
    @pytest.mark.parametrize(
        ("items", "options", "expected"),
        [
            (1000, {}, [111, 333, 1000]),  # the paper's
            (1000, {"least": 30}, [37, 111, 333, 1000]),
            (90, {}, [10, 30, 90]),
            (30, {}, [10, 30]),
            (29, {}, [29]),
            (20, {"least": 2}, [2, 7, 20]),
            (0, {}, [0]),
            (0, {"least": 5}, [0]),
        ],
    )
    def test_items(self, items: int, options: dict, expected: list[int]) -> None:
        assert rungs_of(items, 3, **options) == expected

    def test_brackets_have_the_proportions_of_hyperband(self) -> None:
        assert Counter(itertools.islice(bracket_rungs(3, 3), 17)) == {0: 9, 1: 5, 2: 3}
        assert list(itertools.islice(bracket_rungs(1, 3), 4)) == [0] * 4
        assert Counter(itertools.islice(bracket_rungs(5, 3), 81 + 34 + 15 + 8 + 5)) == {
            0: 81,
            1: 34,
            2: 15,
            3: 8,
            4: 5,
        }

    def test_few_items_are_never_divided(self) -> None:
        assert {s.items for s in MedSaMix(replace(box(3), items=29), 0).ask(30)} == {None}

    def test_promotions_are_those_of_asynchronous_halving(self) -> None:
        """Every suggestion is the one of Li 2020, algorithm 2, written out beside the strategy."""
        problem = replace(box(3), items=90)
        strategy = MedSaMix(problem, 0, trees=5)
        rng = np.random.default_rng(0)
        rungs: dict[int, dict[bytes, float]] = {10: {}, 30: {}, 90: {}}
        asked: dict[bytes, list[int]] = {}
        outstanding: list[Suggestion] = []
        for _ in range(150):
            expected = _promotable(rungs, asked)
            suggestion = strategy.ask(1)[0]
            key = suggestion.point.tobytes()
            items = suggestion.items or 90
            if expected is None:
                assert key not in asked
            else:
                assert (key, items) == expected
            asked.setdefault(key, []).append(items)
            outstanding.append(suggestion)
            while len(outstanding) > rng.integers(0, 6):
                done = outstanding.pop(int(rng.integers(len(outstanding))))
                failed = rng.random() < 0.1
                loss = bowl(done.point) + 0.01 * rng.standard_normal()
                rungs[done.items or 90][done.point.tobytes()] = math.inf if failed else loss
                strategy.tell(
                    [replace(result(done, loss), losses=None) if failed else result(done, loss)]
                )
        paths = {tuple(path) for path in asked.values()}
        # Rungs are nested: one after the other, from wherever the bracket begins.
        assert paths == {(10,), (10, 30), (10, 30, 90), (30,), (30, 90), (90,)}

    def test_nothing_waits(self) -> None:
        suggestions = MedSaMix(replace(box(3), items=90), 0).ask(34)
        assert Counter(s.items for s in suggestions) == {10: 18, 30: 10, None: 6}
        assert len({s.point.tobytes() for s in suggestions}) == 34

    def test_several_objectives_promote_no_more_than_their_share(self) -> None:
        problem = replace(box(3, 2), items=90)
        rng = np.random.default_rng(0)
        strategy = MedSaMix(problem, 0, trees=5)
        told = Counter()
        promoted = Counter()
        seen = set()
        for _ in range(120):
            suggestion = strategy.ask(1)[0]
            items = suggestion.items or 90
            if suggestion.point.tobytes() in seen:
                promoted[items // 3] += 1
                assert promoted[items // 3] <= told[items // 3] // 3
            seen.add(suggestion.point.tobytes())
            strategy.tell([result(suggestion, *rng.random(2))])
            told[items] += 1
        assert min(promoted[10], promoted[30]) > 3


def _promotable(
    rungs: dict[int, dict[bytes, float]], asked: dict[bytes, list[int]]
) -> tuple[bytes, int] | None:
    for items in (30, 10):
        ranked = sorted(rungs[items], key=rungs[items].__getitem__)
        for key in ranked[: len(ranked) // 3]:
            if rungs[items][key] < math.inf and max(asked[key]) == items:
                return key, 3 * items
    return None


class TestScalarisation:
    def test_is_the_augmented_tchebycheff_function(self) -> None:
        rng = np.random.default_rng(0)
        losses = rng.random((7, 3))
        weights = np.array([0.2, 0.5, 0.3])
        for row, value in zip(losses, augmented_tchebycheff(losses, weights), strict=True):
            terms = [weight * loss for weight, loss in zip(weights, row, strict=True)]
            assert value == pytest.approx(max(terms) + 0.05 * sum(terms), rel=1e-15)

    def test_weights_are_uniform_on_the_simplex(self) -> None:
        rng = np.random.default_rng(0)
        weights = np.array([simplex_weights(3, rng) for _ in range(4000)])
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        np.testing.assert_allclose(weights.mean(axis=0), 1 / 3, atol=0.015)
        assert np.mean(weights[:, 0] < 0.5) == pytest.approx(0.75, abs=0.02)  # 1 − (1 − 1/2)²
        assert simplex_weights(1, rng).tolist() == [1.0]

    def test_losses_are_scaled_by_their_range(self) -> None:
        losses = np.array([[1.0, -5.0], [3.0, np.nan], [2.0, -3.0], [1.5, -4.0]])
        expected = [[0, 0], [1, np.nan], [0.5, 1], [0.25, 0.5]]
        np.testing.assert_allclose(scale_losses(losses), expected)
        assert np.all(scale_losses(np.ones((3, 1))) == 0)

    def test_what_lies_far_above_is_pulled_in(self) -> None:
        losses = np.array([0.0, 1.0, 2.0, 3.0, 1e6])[:, None]
        np.testing.assert_allclose(
            scale_losses(losses)[:, 0], [0, 1 / 9, 2 / 9, 3 / 9, 1]
        )  # 3 + 3 · (3 − 1)


class TestForest:
    @pytest.mark.parametrize(
        ("mean", "deviation", "best"), [(0.5, 0.2, 0.4), (0.1, 0.3, 0.4), (0.9, 0.1, 0.4)]
    )
    def test_expected_improvement_is_the_integral(
        self, mean: float, deviation: float, best: float
    ) -> None:
        grid = np.linspace(mean - 12 * deviation, mean + 12 * deviation, 200_001)
        density = np.exp(-0.5 * ((grid - mean) / deviation) ** 2) / (
            deviation * math.sqrt(2 * math.pi)
        )
        integral = float(np.trapezoid(np.maximum(best - grid, 0) * density, grid))
        improvement = expected_improvement(np.array([mean]), np.array([deviation]), best)
        assert improvement[0] == pytest.approx(integral, rel=1e-5)

    def test_certain_predictions_improve_by_what_they_promise(self) -> None:
        improvement = expected_improvement(np.array([0.25, 0.75]), np.zeros(2), 0.5)
        np.testing.assert_allclose(improvement, [0.25, 0.0], atol=1e-12)

    def test_failures_are_not_fitted(self) -> None:
        results = Results(1, 1)
        rng = np.random.default_rng(0)
        for number in range(40):
            results.add(rng.random(2), None if number % 2 else np.array([rng.random()]), 1.0, 0)
        points, shares, losses = results.training()
        assert len(points) == len(shares) == len(losses) == results.successes == 20
        assert np.all(np.isfinite(losses))
        assert math.isinf(results.scores([1], np.ones(1))[0])

    def test_predicts_at_all_items(self) -> None:
        """The forest learns from results on few items and on all.

        Few items report 1 too much; the forest learns that, and the slope from both.
        """
        results = Results(1, 2)
        rng = np.random.default_rng(0)
        for number in range(200):
            point = rng.random(1)
            results.add(point, point + (number % 2), 1 / 9 if number % 2 else 1.0, 1 - number % 2)
        forest = Forest.fit(results, lambda points: points, 15, 0)
        grid = np.linspace(0.05, 0.95, 19)[:, None]
        np.testing.assert_allclose(
            forest.predict(grid).mean(axis=0), grid / 2, atol=0.04
        )  # scaled by the range, 2

    def test_one_forest_serves_all_weights(self) -> None:
        results = Results(2, 1)
        rng = np.random.default_rng(0)
        for _ in range(150):
            point = rng.random(2)
            results.add(point, point.copy(), 1.0, 0)
        forest = Forest.fit(results, lambda points: points, 15, 0)
        corners = np.array([[0.1, 0.9], [0.9, 0.1], [0.9, 0.9]])
        assert forest.ranking(corners, np.array([0.99, 0.01]), 0.5)[0] == 0
        assert forest.ranking(corners, np.array([0.01, 0.99]), 0.5)[0] == 1
