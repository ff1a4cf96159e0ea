"""Groups by usage, by the router's logits and by outputs, against hand-made cases."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mergesearch.merging.mixture.grouping import (
    around_dominant,
    by_outputs,
    counts_by_usage,
    most_used,
    slots_of,
)
from mergesearch.merging.mixture.statistics import LayerStatistics, Numbers, cosines


def statistics(usage: list[float], vectors: Numbers) -> LayerStatistics:
    """Statistics of experts whose logits and outputs are these vectors."""
    return LayerStatistics(np.array(usage), vectors @ vectors.T, vectors @ vectors.T, len(vectors))


@pytest.fixture
def pairs() -> LayerStatistics:
    """Six experts in three directions, two each; usage falls from the last to the first."""
    angles = np.array([0.0, 2.0, 4.0, 0.1, 2.1, 4.1])
    vectors = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    scaled = vectors * np.array([1.0, 9.0, 2.0, 3.0, 1.0, 5.0])[:, None]
    return statistics([0.05, 0.1, 0.15, 0.2, 0.2, 0.3], scaled)


def test_cosines_ignore_lengths_and_survive_vectors_of_zeros() -> None:
    vectors = np.array([[3.0, 0.0], [5.0, 5.0], [0.0, 0.0]])
    root = np.sqrt(0.5)
    expected = [[1, root, 0], [root, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(cosines(vectors @ vectors.T), expected, atol=1e-12)


def test_most_used_experts_stay_in_their_order(pairs: LayerStatistics) -> None:
    assert most_used(pairs, 3) == [(3,), (4,), (5,)]


def test_others_join_the_dominant_expert_that_they_resemble(pairs: LayerStatistics) -> None:
    assert around_dominant(pairs, 3) == [(3, 0), (4, 1), (5, 2)]


def test_clusters_are_those_of_the_directions(pairs: LayerStatistics) -> None:
    assert by_outputs(pairs, 3) == [(3, 0), (4, 1), (5, 2)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_clusters_cover_every_expert_once(count: int) -> None:
    rng = np.random.default_rng(count)
    found = by_outputs(statistics([1 / 6] * 6, rng.normal(size=(6, 4))), count)
    assert len(found) == count
    assert sorted(expert for group in found for expert in group) == list(range(6))


def test_clusters_are_the_best_of_all_divisions_of_a_small_case() -> None:
    vectors = np.random.default_rng(8).normal(size=(6, 3))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def agreement(labels: tuple[int, ...]) -> float:
        return sum(
            float(np.linalg.norm(units[np.array(labels) == label].sum(axis=0)))
            for label in set(labels)
        )

    best = max(agreement(labels) for labels in product(range(2), repeat=6) if len({*labels}) == 2)
    found = by_outputs(statistics([1 / 6] * 6, vectors), 2)
    labels = tuple(next(n for n, group in enumerate(found) if e in group) for e in range(6))
    assert agreement(labels) == pytest.approx(best)


def test_counts_follow_usage_in_the_whole_model_and_keep_one_in_every_block() -> None:
    even = statistics([0.25] * 4, np.eye(4))
    uneven = statistics([0.97, 0.01, 0.01, 0.01], np.eye(4))
    assert counts_by_usage([even, uneven], 4) == [3, 1]
    assert counts_by_usage([even, uneven], 8) == [4, 4]


def test_slots_give_spare_places_to_the_most_used_members() -> None:
    usage = np.array([0.1, 0.4, 0.2, 0.3])
    slots = slots_of([(1, 2, 0), (3,)], usage, 3, mean=False)
    assert [(s.expert, s.group, s.rows) for s in slots] == [
        (1, 0, (1,)),
        (2, 0, (2,)),
        (3, 1, (3,)),
    ]


def test_the_mean_row_is_of_members_without_a_place_of_their_own() -> None:
    usage = np.array([0.1, 0.4, 0.2, 0.3])
    slots = slots_of([(1, 2, 0), (3,)], usage, 3, mean=True)
    assert [s.rows for s in slots] == [(1, 0), (2,), (3,)]
