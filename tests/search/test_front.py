"""Front metrics against brute force, and the properties that a study relies on."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mergesearch.evaluators import Objective
from mergesearch.merging import InputError, StudyFailedError
from mergesearch.search.front import (
    Front,
    Normaliser,
    choose_leaders,
    hypervolume,
    nondominated,
    signs,
    to_losses,
)

UP = Objective("accuracy", "maximize")
DOWN = Objective("loss", "minimize")


def clouds(most: int = 12, objectives: tuple[int, int] = (1, 4)):
    """Losses on a coarse grid, so that ties and equal rows are common."""
    grid = st.integers(-3, 12).map(lambda v: v / 8)
    shapes = st.tuples(st.integers(1, most), st.integers(*objectives))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=grid))


def unit(objectives: int) -> Normaliser:
    return Normaliser(np.zeros(objectives), np.ones(objectives))


def dominated_by_any(losses: np.ndarray, row: int) -> bool:
    return any(np.all(other <= losses[row]) and np.any(other < losses[row]) for other in losses)


def volume_by_cells(losses: np.ndarray, reference: np.ndarray) -> float:
    """Sum over the cells of the grid that the points themselves span: exact in any dimension."""
    cuts = [
        np.unique([*losses[:, m][losses[:, m] < reference[m]], reference[m]])
        for m in range(len(reference))
    ]
    total = 0.0
    for cell in itertools.product(*(range(len(cut) - 1) for cut in cuts)):
        corner = np.array([cut[i] for cut, i in zip(cuts, cell, strict=True)])
        if np.any(np.all(losses <= corner, axis=1)):
            total += float(
                np.prod([cut[i + 1] - cut[i] for cut, i in zip(cuts, cell, strict=True)])
            )
    return total


class TestLosses:
    def test_signs_flip_once_and_in_order(self):
        assert to_losses({"loss": 2.0, "accuracy": 0.5, "other": 9.0}, [UP, DOWN]).tolist() == [
            -0.5,
            2.0,
        ]
        assert signs([DOWN, UP]).tolist() == [1.0, -1.0]


class TestNondominated:
    @given(clouds())
    def test_agrees_with_the_definition(self, losses):
        expected = [not dominated_by_any(losses, row) for row in range(len(losses))]
        assert nondominated(losses).tolist() == expected

    def test_rows_that_are_not_finite_are_never_members(self):
        losses = np.array([[np.nan, 0.0], [1.0, 1.0], [-np.inf, 5.0], [np.inf, 0.0]])
        assert nondominated(losses).tolist() == [False, True, False, False]
        assert nondominated(np.full((2, 2), np.nan)).tolist() == [False, False]
        assert nondominated(np.empty((0, 3))).tolist() == []


class TestHypervolume:
    @given(clouds(8))
    def test_agrees_with_a_sum_over_cells(self, losses):
        reference = np.full(losses.shape[1], 1.1)
        assert hypervolume(losses, reference) == pytest.approx(
            volume_by_cells(losses, reference), abs=1e-12
        )

    @given(clouds(8), st.integers(0, 7))
    def test_another_point_never_takes_volume_away(self, losses, left_out):
        reference = np.full(losses.shape[1], 1.1)
        fewer = np.delete(losses, left_out % len(losses), axis=0)
        assert hypervolume(losses, reference) >= hypervolume(fewer, reference) - 1e-12

    def test_nothing_before_the_reference_is_zero(self):
        assert hypervolume([[2.0, 0.0], [np.nan, 0.0], [1.0, 0.5]], [1.0, 1.0]) == 0.0


class TestNormaliser:
    def test_anchors_span_zero_to_one_and_the_reference_lies_behind(self):
        anchors = np.array([[-0.9, 2.0], [-0.5, 1.0], [np.nan, 0.0]])
        scale = Normaliser.from_anchors(anchors)
        np.testing.assert_allclose(scale.normalise(anchors[:2]), [[0, 1], [1, 0]])
        np.testing.assert_allclose(scale.scale, [[-0.9, -0.5], [1.0, 2.0]])
        np.testing.assert_allclose(
            scale.low + scale.reference * (scale.high - scale.low), [-0.46, 2.1]
        )
        assert scale.scalarise(np.array([-0.7, 1.0]), [0.5, 0.5]) == pytest.approx(0.25)
        assert scale.hypervolume(np.array([[-0.9, 1.0]])) == pytest.approx(1.1**2)

    @pytest.mark.parametrize("value", [0.0, -0.7, 3e9, 1e-12])
    def test_equal_anchors_leave_a_usable_range(self, value):
        scale = Normaliser.from_anchors(np.full((3, 1), value))
        assert scale.high[0] > scale.low[0]
        assert np.isfinite(scale.normalise([value * 2 + 1])).all()

    def test_no_finite_anchor_is_a_failed_study(self):
        with pytest.raises(StudyFailedError, match="at least one anchor"):
            Normaliser.from_anchors([[np.nan, 1.0]])
        with pytest.raises(StudyFailedError, match="at least one anchor"):
            Normaliser.from_anchors(np.empty((0, 2)))

    @given(clouds())
    def test_survives_its_dictionary_exactly(self, losses):
        scale = Normaliser.from_anchors(losses)
        again = Normaliser.from_dict(scale.to_dict())
        assert again.low.tobytes() == scale.low.tobytes()
        assert again.high.tobytes() == scale.high.tobytes()

    @pytest.mark.parametrize(
        "data", [{"low": [0.0]}, {"low": [1.0], "high": [1.0]}, {"low": [0.0], "high": [1.0, 2.0]}]
    )
    def test_a_damaged_dictionary_is_refused(self, data):
        with pytest.raises(InputError, match="normaliser: expected"):
            Normaliser.from_dict(data)


class TestFront:
    @given(clouds(20))
    def test_members_and_volume_agree_with_the_batch_functions_after_every_trial(self, losses):
        front = Front(unit(losses.shape[1]))
        for number, row in enumerate(losses):
            before = set(front.numbers)
            joined = front.add(number, row)
            so_far = losses[: number + 1]
            assert front.numbers == np.flatnonzero(nondominated(so_far)).tolist()
            assert joined == (number in front.numbers)
            assert set(front.numbers) - before <= {number}
            assert front.hypervolume == pytest.approx(
                hypervolume(so_far, front.scale.reference), abs=1e-9
            )
        np.testing.assert_allclose(front.losses, losses[front.numbers])
        assert len(front.history) == len(losses)

    def test_history_never_falls_and_failures_leave_it_level(self):
        rng = np.random.default_rng(0)
        front = Front(unit(3))
        for number, row in enumerate(rng.random((200, 3))):
            front.add(number, row if number % 7 else np.full(3, np.nan))
        assert np.all(np.diff(front.history) >= 0)
        assert not any(number % 7 == 0 for number in front.numbers)

    def test_five_thousand_trials_take_seconds(self):
        rng = np.random.default_rng(1)
        losses = np.abs(rng.normal(size=(5000, 3)))
        losses = 1.2 - losses / np.linalg.norm(losses, axis=1)[:, None] * rng.uniform(
            0.9, 1.0, (5000, 1)
        )
        front = Front(unit(3))
        start = time.process_time()
        for number, row in enumerate(losses):
            front.add(number, row)
        assert time.process_time() - start < 10
        assert len(front.numbers) > 100
        assert front.hypervolume == pytest.approx(
            hypervolume(losses, front.scale.reference), rel=1e-9
        )


class TestLeaders:
    @settings(max_examples=60)
    @given(clouds(20), st.integers(1, 8))
    def test_best_scalarised_and_extremes_come_first_and_nothing_repeats(self, losses, count):
        scale = unit(losses.shape[1])
        scalars = losses.mean(axis=1)
        chosen = choose_leaders(losses, scalars, scale, count)
        assert len(chosen) == len(set(chosen)) == min(count, len(losses))
        assert scalars[chosen[0]] == scalars.min()
        if count > losses.shape[1]:
            assert np.array_equal(losses[chosen].min(axis=0), losses.min(axis=0))

    @settings(max_examples=40)
    @given(clouds(16, (2, 3)), st.integers(1, 6))
    def test_members_of_the_front_come_before_the_rest(self, losses, count):
        chosen = choose_leaders(losses, losses.mean(axis=1), unit(losses.shape[1]), count)
        on_front = nondominated(losses)[chosen].tolist()
        assert on_front == sorted(on_front, reverse=True)

    def test_one_objective_gives_the_best_in_order(self):
        losses = np.array([[3.0], [1.0], [np.nan], [2.0], [0.5]])
        assert choose_leaders(losses, losses[:, 0], unit(1), 3) == [4, 1, 3]

    def test_greedy_choice_spreads_over_the_front(self):
        # A dense clump near one end and one lonely member at the knee: the knee adds the most
        # volume.
        losses = np.array(
            [
                [0.0, 1.0],
                *[[0.01 * i, 0.99 - 0.01 * i] for i in range(1, 8)],
                [0.4, 0.4],
                [1.0, 0.0],
            ]
        )
        chosen = choose_leaders(losses, losses @ [0.9, 0.1], unit(2), 3)
        assert set(chosen) == {0, 8, 9}

    def test_is_near_the_best_possible_subset(self):
        rng = np.random.default_rng(5)
        losses = np.sort(rng.random((9, 2)), axis=0)
        losses[:, 1] = losses[::-1, 1]
        scalars = losses.mean(axis=1)
        chosen = choose_leaders(losses, scalars, unit(2), 5)
        # The first three are given; greedy reaches at least 1 - 1/e of what the other two could add
        # (submodularity).
        given_volume = hypervolume(losses[chosen[:3]], [1.1, 1.1])
        others = [row for row in range(9) if row not in chosen[:3]]
        pairs = itertools.combinations(others, 2)
        best = max(hypervolume(losses[[*chosen[:3], *pair]], [1.1, 1.1]) for pair in pairs)
        gained = hypervolume(losses[chosen], [1.1, 1.1]) - given_volume
        assert gained >= (1 - 1 / np.e) * (best - given_volume) - 1e-12

    def test_no_finite_row_gives_none(self):
        assert choose_leaders(np.full((3, 2), np.nan), np.full(3, np.nan), unit(2), 2) == []
