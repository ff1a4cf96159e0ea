"""Where populations begin: known merges, mixtures, draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergesearch.search.strategies.base import TrialResult
from mergesearch.search.strategies.parts.seeding import (
    default_sigma,
    draw_near,
    first_points,
    known_merges,
    starting_points,
)
from tests.search.strategies.populations import anchor, box, sphere


def test_known_merges_are_whole_distinct_and_best_first() -> None:
    good, fair, bad = (anchor(point, sphere) for point in ([0.6, 0.5], [0.6, 0.2], [0.0, 0.0]))
    failed = TrialResult(None, np.array([0.1, 0.1]), None)
    partial = replace(anchor([0.6, 0.6], sphere), evaluated=3)
    again = replace(
        fair, point=fair.point.copy(), losses=fair.losses + 9.0
    )  # noise: the better one counts
    problem = box(2, anchors=(bad, failed, fair, partial, good, again))
    assert [known.point.tolist() for known in known_merges(problem)] == [
        [0.6, 0.5],
        [0.6, 0.2],
        [0.0, 0.0],
    ]


def test_the_start_comes_first_then_midpoints_of_the_best() -> None:
    anchors = tuple(anchor(point, sphere) for point in ([0.0, 0.0], [0.6, 0.2], [0.6, 0.6]))
    points = starting_points(box(2, anchors=anchors))
    np.testing.assert_allclose(
        points, [[0.3, 0.3], [0.6, 0.4], [0.3, 0.1]]
    )  # (0.3, 0.3) is a midpoint, too: once


def test_a_start_that_is_an_anchor_is_not_measured_again() -> None:
    assert starting_points(box(2, anchors=(anchor([0.3, 0.3], sphere),))) == []
    assert len(starting_points(box(2))) == 1


def test_draws_surround_the_anchors_that_no_other_dominates() -> None:
    def two(point: np.ndarray) -> np.ndarray:
        return np.array([point[0], 1.0 - point[0] + 10.0 * point[1]])

    anchors = tuple(anchor(point, two) for point in ([0.1, 0.0], [0.9, 0.0], [0.5, 0.9]))
    problem = box(2, 2, anchors=anchors)
    points = first_points(problem, np.random.default_rng(0), 40, sigma=0.001)
    assert len(points) == 40
    drawn = np.array(points[4:])  # after the start and the three midpoints
    assert np.all(np.minimum(abs(drawn[:, 0] - 0.1), abs(drawn[:, 0] - 0.9)) < 0.01)
    assert 10 < np.sum(drawn[:, 0] < 0.5) < 26
    assert np.all(drawn[:, 1] < 0.01)


@pytest.mark.parametrize("dim", [1, 10, 40, 2000])
def test_the_length_of_a_draw_does_not_grow_beyond_ten_dimensions(dim: int) -> None:
    assert default_sigma(dim) == pytest.approx(0.2 if dim <= 10 else 0.2 * np.sqrt(10 / dim))
    problem = box(dim, start=0.5)
    rng = np.random.default_rng(1)
    draws = np.array([draw_near(problem.start, problem, rng) for _ in range(200)])
    assert np.all((draws >= 0) & (draws <= 1))
    length = np.sqrt(np.mean(np.sum((draws - 0.5) ** 2, axis=1)))
    assert length == pytest.approx(0.2 * np.sqrt(min(dim, 10)), rel=0.15)
