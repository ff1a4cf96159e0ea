"""M2N2 beyond the contract: the competition, the arc, the limit of segments, seeds, scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergesearch.merging import Field, InputError, Layout, Recipe, Source
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.resident.segment_gram import SegmentGram
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.m2n2 import Archive, M2n2, Scoring, attraction_to, draw, shares
from mergesearch.search.strategies.parts.field_crossover import (
    Crossed,
    angle_between,
    arc_weights,
    cross,
    limit,
)
from mergesearch.spaces import SegmentSpace, segment_space

SIZE = 1024
ITEMS = 10


def weights(
    directions: int = 2, seed: int = 0, zero_base: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = np.zeros(SIZE, np.float32) if zero_base else rng.standard_normal(SIZE, np.float32)
    return base, rng.standard_normal((directions, SIZE), np.float32)


def make_space(segments: int = 8, directions: int = 2) -> SegmentSpace:
    base, rows = weights(directions)
    layout = Layout.build({"a": ((SIZE,), "float32")})
    sources = tuple(Source(name, name) for name in "abcd"[:directions])
    template = Recipe(
        Source("base", "base"), sources, "task_arithmetic", Field.constant(SIZE, [0.0] * directions)
    )
    gram = SegmentGram.of_arrays(base, rows).gram
    return segment_space(
        template, layout, segments=segments, low=0.0, high=2.0, start=0.5, gram=gram
    )


def make_problem(
    space: SegmentSpace | None = None, anchors: tuple[TrialResult, ...] = (), items: int = ITEMS
) -> Problem:
    space = space or make_space()
    return Problem(
        space.lower,
        space.upper,
        space.start,
        objectives=1,
        budget=1000,
        scale=np.array([[-1.0, 0.0]]),
        weights=np.ones(1),
        anchors=anchors,
        signs=-np.ones(1),
        names=("accuracy",),
        items=items,
        space=space,
    )


def solved(*items: int, of: int = ITEMS) -> np.ndarray:
    scores = np.zeros(of)
    scores[list(items)] = 1.0
    return scores


def constant(space: SegmentSpace, *coefficients: float) -> np.ndarray:
    point = space.encode(Field.constant(SIZE, coefficients))
    assert point is not None
    return point


def told(point: np.ndarray, scores: np.ndarray, id: int | None = None) -> TrialResult:
    return TrialResult(id, point, np.array([-scores.mean()]), {"accuracy": scores})


def parents(seed: int, segments: int = 5, directions: int = 2) -> tuple[Field, Field]:
    rng = np.random.default_rng(seed)
    cuts = [np.unique([0, SIZE, *rng.integers(1, SIZE, segments - 1)]) for _ in range(2)]
    one, other = (Field(cut, rng.uniform(-0.2, 1.2, (directions, cut.size - 1))) for cut in cuts)
    return one, other


def materialise(base: np.ndarray, rows: np.ndarray, field: Field) -> np.ndarray:
    out = np.empty_like(base)
    combine(base, rows, field, "delta", out)
    return out


def slerp(one: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The definition, on weights: the angle of whole vectors."""
    cosine = one @ other / np.sqrt((one @ one) * (other @ other))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) <= 1e-6:
        return (1 - share) * one + share * other
    return (np.sin((1 - share) * angle) * one + np.sin(share * angle) * other) / np.sin(angle)


class TestChild:
    @pytest.mark.parametrize("zero_base", [True, False])
    @pytest.mark.parametrize("seed", range(6))
    def test_is_the_child_of_the_weights(self, seed: int, zero_base: bool) -> None:
        base, rows = weights(2, seed, zero_base)
        first, second = parents(seed)
        rng = np.random.default_rng(seed)
        share = rng.random()
        split = int(rng.integers(SIZE))
        child = cross(first, second, SegmentGram.of_arrays(base, rows).gram, share, split).field
        one, other = (materialise(base, rows, f).astype(np.float64) - base for f in (first, second))
        towards = np.where(np.arange(SIZE) < split, share, 1 - share)
        expected = base + slerp(one, other, towards)
        np.testing.assert_allclose(materialise(base, rows, child), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("split", [0, 1, 400, SIZE])
    @pytest.mark.parametrize("swapped", [False, True])
    def test_at_the_ends_is_one_parent_before_the_split_and_the_other_after(
        self, split: int, swapped: bool
    ) -> None:
        first, second = parents(3)
        gram = SegmentGram.of_arrays(*weights()).gram
        child = cross(first, second, gram, float(swapped), split).field
        before, after = (second, first) if swapped else (first, second)
        if split > 0:
            assert child.restrict(0, split).compact() == before.restrict(0, split).compact()
        if split < SIZE:
            assert child.restrict(split, SIZE).compact() == after.restrict(split, SIZE).compact()

    def test_the_arc_keeps_the_length_of_parents_of_one_length(self) -> None:
        base, rows = weights(zero_base=True)
        rows[1] *= np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
        gram = SegmentGram.of_arrays(base, rows).gram
        ends = Field.constant(SIZE, [1.0, 0.0]), Field.constant(SIZE, [0.0, 1.0])
        for share in (0.0, 0.2, 0.5, 0.9):
            child = materialise(base, rows, cross(*ends, gram, share, SIZE).field)
            assert np.linalg.norm(child) == pytest.approx(np.linalg.norm(rows[0]), rel=1e-6)

    def test_the_line_is_straight_between_parents_without_an_angle(self) -> None:
        gram = SegmentGram.of_arrays(*weights()).gram
        one = Field.constant(SIZE, [0.4, 0.2])
        base = Field.constant(SIZE, [0.0, 0.0])
        for other in (
            one,
            Field.constant(SIZE, [0.8, 0.4]),
            base,
            Field.constant(SIZE, [-0.4, -0.2]),
        ):
            child = cross(one, other, gram, 0.25, SIZE).field
            expected = 0.75 * one.values + 0.25 * other.values
            np.testing.assert_allclose(
                child.values, np.repeat(expected, child.segments, axis=1), atol=1e-12
            )

    def test_angles_and_weights(self) -> None:
        inner = np.eye(2)[None]
        ends = np.array([[1.0], [0.0]]), np.array([[0.0], [2.0]])
        assert angle_between(*ends, inner) == pytest.approx(np.pi / 2)
        assert angle_between(ends[0], 0 * ends[1], inner) == 0.0
        assert angle_between(ends[0], -ends[0], inner) == pytest.approx(np.pi)
        for pair in arc_weights(np.array([0.0, 0.5, 1.0]), np.pi / 2):
            assert sorted(pair.tolist()) == pytest.approx([0.0, np.sqrt(0.5), 1.0])


class TestLimit:
    def orthogonal(self) -> tuple[np.ndarray, np.ndarray]:
        base, rows = weights(2, 5)
        rows[0, ::2] = 0.0
        rows[1, 1::2] = 0.0
        rows[0, 300:600] *= 10
        return base, rows

    def crossed(self, base: np.ndarray, rows: np.ndarray, seed: int = 1) -> Crossed:
        gram = SegmentGram.of_arrays(base, rows).gram
        return cross(*parents(seed, 8), gram, 0.3, 500)

    def test_joins_the_neighbours_that_change_the_merge_least(self) -> None:
        base, rows = self.orthogonal()
        crossed = self.crossed(base, rows)
        field = crossed.field
        count = crossed.field.segments
        before = materialise(base, rows, field).astype(np.float64)
        after = materialise(base, rows, limit(crossed, count - 1)).astype(np.float64)
        best = min(
            self.least_change(rows, before - base, field, index) for index in range(count - 1)
        )
        assert np.sum((after - before) ** 2) == pytest.approx(best, rel=1e-4)

    def least_change(self, rows: np.ndarray, delta: np.ndarray, field: Field, index: int) -> float:
        """Least squares: the best that a joined segment can do."""
        part = slice(field.boundaries[index], field.boundaries[index + 2])
        design = rows[:, part].T.astype(np.float64)
        solution = np.linalg.lstsq(design, delta[part], rcond=None)[0]
        return float(np.sum((design @ solution - delta[part]) ** 2))

    @pytest.mark.parametrize("most", [1, 2, 5, 10])
    def test_joining_step_by_step_is_joining_at_once(self, most: int) -> None:
        base, rows = weights()
        crossed = self.crossed(base, rows)
        at_once = limit(crossed, most)
        step = crossed
        while step.field.segments > most:
            joined = limit(step, step.field.segments - 1)
            gram = SegmentGram.of_arrays(base, rows).gram(joined.boundaries)
            step = Crossed(joined, np.diagonal(gram[:, 1:, 1:], axis1=1, axis2=2))
        assert at_once.segments == most
        assert np.array_equal(at_once.boundaries, step.field.boundaries)
        np.testing.assert_allclose(at_once.values, step.field.values, rtol=1e-9, atol=1e-12)

    def test_equal_neighbours_cost_nothing(self) -> None:
        values = np.array([[0.1, 0.1, 0.7, 0.7, 0.3]])
        field = Field(np.array([0, 10, 20, 30, 40, 50]), values)
        assert limit(Crossed(field, np.ones((5, 1))), 3) == field.compact()

    def test_directions_that_are_zero_are_joined_by_length(self) -> None:
        field = Field(np.array([0, 10, 40, 50]), np.array([[0.0, 1.0, 5.0]]))
        joined = limit(Crossed(field, np.zeros((3, 1))), 2)
        assert joined == Field(np.array([0, 40, 50]), np.array([[0.75, 5.0]]))

    def test_proposals_never_have_more_segments_than_the_space(self) -> None:
        space = make_space(segments=4)
        strategy = M2n2(make_problem(space), 0)
        counts = []
        for suggestion in explore(strategy, lambda field: regions(field, ITEMS), 80):
            counts.append(space.field(suggestion).segments)
        assert max(counts) == 4


def regions(field: Field, items: int) -> np.ndarray:
    """Items at positions along the flat index.

    In the first half the first direction solves them, then the second.
    """
    positions = (np.arange(items) + 0.5) * SIZE / items
    values = field.at(positions.astype(int))
    right = np.where(positions < SIZE / 2, values[0], values[1])
    wrong = np.where(positions < SIZE / 2, values[1], values[0])
    return ((right > 0.7) & (wrong < 0.5)).astype(float)


def explore(strategy: M2n2, score: Callable[[Field], np.ndarray], trials: int) -> list[np.ndarray]:
    """Run a strategy; the points it suggested."""
    points = []
    for _ in range(trials):
        suggestion = strategy.ask(1)[0]
        points.append(suggestion.point)
        field = strategy._space.field(suggestion.point)
        strategy.tell([told(suggestion.point, score(field), suggestion.id)])
    return points


class TestCompetition:
    @given(seed=st.integers(0, 100), alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    def test_shares_are_the_formula(self, seed: int, alpha: float) -> None:
        rng = np.random.default_rng(seed)
        scores = rng.random((4, 6)) * (rng.random((4, 6)) < 0.5)
        capacity = rng.random(6)
        for j in range(6):
            z = sum(scores[p, j] for p in range(4)) ** alpha if scores[:, j].any() else 1.0
            expected = [scores[p, j] * capacity[j] / z for p in range(4)]
            np.testing.assert_allclose(shares(scores, capacity, alpha)[:, j], expected, rtol=1e-12)

    def test_an_item_that_nobody_solves_gives_nothing(self) -> None:
        for alpha in (0.0, 1.0, 3.0):
            with np.errstate(all="raise"):
                shared = shares(np.array([[1.0, 0.0], [1.0, 0.0]]), np.ones(2), alpha)
            assert shared[:, 1].tolist() == [0.0, 0.0]

    def test_at_alpha_one_everything_solved_is_shared_out(self) -> None:
        rng = np.random.default_rng(0)
        scores = rng.random((5, 8))
        capacity = rng.random(8)
        scores[:, 3] = 0.0
        np.testing.assert_allclose(
            shares(scores, capacity, 1.0).sum(axis=0), np.where(np.arange(8) == 3, 0, capacity)
        )

    def test_attraction_is_what_a_mate_adds(self) -> None:
        shared = np.array([[1.0, 0.0, 2.0], [0.5, 3.0, 2.0], [2.0, 1.0, 0.0]])
        assert attraction_to(shared, 0).tolist() == [0.0, 3.0, 2.0]

    def test_a_unique_item_beats_a_clone_of_higher_accuracy(self) -> None:
        fields = [Field.constant(SIZE, [value, 0.0]) for value in (0.1, 0.2, 0.3, 0.4)]
        for alpha, survives in ((1.0, True), (0.0, False)):
            archive = Archive(3, alpha)
            for field in fields[:3]:
                archive.add(field, solved(0, 1), np.ones(ITEMS))
            archive.add(fields[3], solved(9), np.ones(ITEMS))
            assert (fields[3] in archive.fields) == survives
            assert len(archive.fields) == 3

    @pytest.mark.parametrize("attraction", [True, False])
    @pytest.mark.parametrize("scores", [solved(), solved(1, 2), np.full(ITEMS, 0.3)])
    def test_an_archive_of_equals_still_finds_two_parents(
        self, attraction: bool, scores: np.ndarray
    ) -> None:
        archive = Archive(5, 1.0)
        rng = np.random.default_rng(0)
        for value in range(5):
            archive.add(Field.constant(SIZE, [value, 0.0]), scores, np.ones(ITEMS))
        with np.errstate(all="raise"):
            pairs = [archive.draw_parents(rng, attraction) for _ in range(200)]
        assert all(first != second for first, second in pairs)
        assert {field for pair in pairs for field in pair} == set(archive.fields)

    def test_proposals_of_an_archive_of_equals_are_numbers(self) -> None:
        strategy = M2n2(make_problem(), 1, archive=4)
        points = np.array(explore(strategy, lambda field: solved(1), 40))
        assert np.all(np.isfinite(points))
        assert len(strategy.archive.fields) == 4

    def test_places_are_drawn_by_weight(self) -> None:
        rng = np.random.default_rng(0)
        counts = np.bincount(
            [draw(rng, np.array([0.0, 1.0, 3.0, 0.0])) for _ in range(4000)], minlength=4
        )
        assert counts[[0, 3]].tolist() == [0, 0]
        assert counts[2] / counts[1] == pytest.approx(3.0, rel=0.15)
        assert {draw(rng, np.zeros(3)) for _ in range(50)} == {0, 1, 2}

    def test_the_archive_keeps_its_size_and_takes_no_copies(self) -> None:
        strategy = M2n2(make_problem(), 0, archive=6)
        explore(strategy, lambda field: regions(field, ITEMS), 60)
        assert len(strategy.archive.fields) == 6
        assert strategy.archive.scores.shape == (6, ITEMS)
        copy = strategy._space.encode(strategy.archive.fields[2])
        before = list(strategy.archive.fields)
        strategy.tell([told(copy, solved(*range(ITEMS)))])
        assert strategy.archive.fields == before

    def test_the_best_is_recommended_although_it_lost_the_competition(self) -> None:
        space = make_space()
        strategy = M2n2(make_problem(space), 0, archive=2)
        best = constant(space, 0.2, 0.2)
        for point, items in (
            (constant(space, 0.1, 0.1), (0, 1, 2, 6, 7)),
            (best, (0, 1, 2, 3, 4, 5)),
            (constant(space, 0.3, 0.3), (3, 4, 5, 8, 9)),
        ):
            strategy.tell([told(point, solved(*items))])
        assert space.field(best) not in strategy.archive.fields
        assert np.array_equal(strategy.best()[0], best)


class TestSearch:
    def test_joins_what_two_experts_know(self) -> None:
        for seed in range(3):
            strategy = M2n2(make_problem(items=20), seed)
            explore(strategy, lambda field: regions(field, 20), 300)
            field = strategy._space.field(strategy.best()[0])
            assert regions(field, 20).mean() >= 0.95

    def test_cannot_join_them_without_a_split_point(self) -> None:
        strategy = M2n2(make_problem(items=20), 0, split=False)
        points = explore(strategy, lambda field: regions(field, 20), 200)
        assert all(strategy._space.field(point).segments == 1 for point in points)
        assert regions(strategy._space.field(strategy.best()[0]), 20).mean() == 0.5

    def test_mutation_reaches_coefficients_that_crossing_cannot(self) -> None:
        space = make_space(segments=1, directions=1)
        anchors = tuple(told(constant(space, c), solved(0) * c) for c in (0.2, 0.4, 0.5, 1.0))
        for mutation, reaches in ((0.0, False), (0.2, True)):
            strategy = M2n2(make_problem(space, anchors), 0, mutation=mutation)
            points = explore(strategy, lambda field: solved(0) * min(field.values[0, 0], 1), 50)
            assert (max(points)[0] > 1.0) == reaches
            assert np.all((np.array(points) >= 0.0) & (np.array(points) <= 2.0))

    def test_children_stay_in_the_box(self) -> None:
        space = make_space()
        narrow = replace(space, upper=np.where(space.upper > 2.0, space.upper, 1.0))
        problem = make_problem(narrow)
        points = explore(M2n2(problem, 0, mutation=0.3), lambda field: regions(field, ITEMS), 60)
        assert np.all((np.array(points) >= narrow.lower) & (np.array(points) <= narrow.upper))
        assert np.max(np.array(points)[:, 7:]) == 1.0


class TestSeeds:
    def test_without_anchors_the_start_then_each_direction_then_mixtures(self) -> None:
        space = make_space()
        points = [s.point for s in M2n2(make_problem(space), 0).ask(6)]
        expected = [space.start, constant(space, 1.0, 0.0), constant(space, 0.0, 1.0)]
        assert np.array_equal(points[:3], expected)
        mixed = [space.field(point).values[:, 0] for point in points[3:]]
        assert len({tuple(row) for row in mixed}) == 3
        assert all(row.min() >= 0 and row.sum() <= 1 for row in mixed)

    def test_anchors_are_members_experts_first_and_are_not_asked_again(self) -> None:
        space = make_space()
        average, one, other = (constant(space, *c) for c in ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0)))
        anchors = tuple(told(point, solved(0)) for point in (average, one, other, one))
        strategy = M2n2(make_problem(space, anchors), 0)
        assert strategy.archive.fields == [space.field(point) for point in (one, other, average)]
        assert space.field(strategy.ask(1)[0].point) not in strategy.archive.fields

    def test_what_anchors_leave_out_is_asked(self) -> None:
        space = make_space()
        anchors = (told(space.start, solved(0)), told(constant(space, 1.0, 0.0), solved(1)))
        strategy = M2n2(make_problem(space, anchors), 0)
        assert np.array_equal(strategy.ask(1)[0].point, constant(space, 0.0, 1.0))

    def test_results_that_cannot_compete_do_not_enter(self) -> None:
        space = make_space()
        strategy = M2n2(make_problem(space), 0)
        point = constant(space, 0.3, 0.3)
        scores = solved(1)
        strategy.tell([told(point, scores)])
        strategy.tell(
            [
                TrialResult(0, constant(space, 0.1, 0.1), None),
                TrialResult(1, constant(space, 0.2, 0.2), np.array([-0.9])),
                replace(told(constant(space, 0.4, 0.4), solved(1, 2)), evaluated=ITEMS),
                told(constant(space, 0.5, 0.5), solved(1, 2, of=ITEMS + 1)),
            ]
        )
        assert strategy.archive.fields == [space.field(point)]
        assert np.array_equal(strategy.best()[0], point)


class TestScores:
    def scoring(self, objectives: dict[str, float], weights: list[float], scale: list) -> Scoring:
        problem = replace(
            make_problem(),
            objectives=len(objectives),
            weights=np.array(weights),
            scale=np.array(scale, float),
            signs=np.array(list(objectives.values())),
            names=tuple(objectives),
        )
        return Scoring(problem)

    def trial(self, **items: list[float]) -> TrialResult:
        return TrialResult(
            0,
            np.zeros(1),
            np.zeros(len(items)),
            {k: np.array(v, float) for k, v in items.items() if v},
        )

    def test_shares_are_taken_as_they_are(self) -> None:
        scoring = self.scoring({"acc": -1.0, "error": 1.0}, [0.5, 0.5], [[-1, 0], [0, 1]])
        scores = scoring.of(self.trial(acc=[0, 1, 0.25], error=[0, 1]))
        assert scores.tolist() == [0, 1, 0.25, 1, 0]

    def test_each_objective_shares_its_weight(self) -> None:
        scoring = self.scoring({"a": -1.0, "b": -1.0}, [0.25, 0.75], [[-1, 0], [-1, 0]])
        scoring.of(self.trial(a=[1, 1, 1, 1], b=[1, 0, 1]))
        np.testing.assert_allclose(scoring.capacity, [0.0625] * 4 + [0.25] * 3)

    def test_losses_beyond_one_are_scaled_by_the_anchors(self) -> None:
        scoring = self.scoring({"loss": 1.0}, [1.0], [[2.0, 4.0]])
        losses = [2.0, 4.0, 3.0, -50.0, 0.0, 900.0, np.inf, np.nan]
        scores = scoring.of(self.trial(loss=losses))
        assert scores[:3].tolist() == [0.75, 0.25, 0.5]
        assert np.all((scores >= 0) & (scores <= 1))
        order = np.argsort(losses[:6])
        assert np.all(np.diff(scores[:6][order]) < 0)
        assert scores[6:].tolist() == [0.0, 0.0]

    def test_scores_on_another_scale_are_flipped_too(self) -> None:
        scoring = self.scoring({"bleu": -1.0}, [1.0], [[-40.0, -20.0]])
        assert scoring.of(self.trial(bleu=[40, 20, 100])).tolist() == [
            0.75,
            0.25,
            pytest.approx(1 - 0.5 / 8),
        ]

    def test_an_objective_without_items_is_one_item(self) -> None:
        scoring = self.scoring({"acc": -1.0, "size": 1.0}, [0.5, 0.5], [[-1, 0], [1.0, 5.0]])
        trial = TrialResult(0, np.zeros(1), np.array([-0.5, 3.0]), {"acc": solved(1, of=2)})
        assert scoring.of(trial).tolist() == [0.0, 1.0, 0.5]
        assert scoring.capacity.tolist() == [0.25, 0.25, 0.5]
        assert scoring.of(TrialResult(1, np.zeros(1), np.array([-0.5, 3.0]))) is None


@pytest.mark.parametrize("space", [None, replace(make_space(), gram=None)])
def test_other_spaces_are_refused_in_one_line(space: SegmentSpace | None) -> None:
    with pytest.raises(
        InputError, match=r"^strategy\.name: m2n2 expects a space of segments .* choose cma_es"
    ):
        M2n2(replace(make_problem(), space=space), 0)


def test_weights_are_not_read_before_there_are_parents() -> None:
    def unread(boundaries: np.ndarray) -> np.ndarray:
        raise AssertionError("read")

    space = replace(make_space(), gram=unread)
    anchors = tuple(told(constant(space, *row), solved(0)) for row in np.eye(2))
    strategy = M2n2(make_problem(space, anchors), 0)
    strategy.ask(1)  # the start
    with pytest.raises(AssertionError, match="read"):
        strategy.ask(1)
