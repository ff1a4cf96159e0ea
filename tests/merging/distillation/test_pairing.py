"""Pieces and pairs of tokens, against plain searches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergesearch.merging.distillation.pairing import Piece, cheapest_path, pieces, token_pairs
from mergesearch.merging.distillation.tokenized import Tokenized

CUTS = st.lists(st.integers(0, 3), min_size=1, max_size=8)


def every_path(rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """All monotone paths through a table."""
    if rows == columns == 1:
        return [[(0, 0)]]
    before = [(rows - 1, columns - 1), (rows - 1, columns), (rows, columns - 1)]
    end = (rows - 1, columns - 1)
    return [[*path, end] for i, j in before if i and j for path in every_path(i, j)]


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(0, 5), min_size=16, max_size=16))
def test_a_path_costs_no_more_than_any_other(rows: int, columns: int, numbers: list[int]) -> None:
    costs = np.array(numbers[: rows * columns], dtype=np.float64).reshape(rows, columns)
    found = cheapest_path(costs)
    least = min(sum(costs[at] for at in path) for path in every_path(rows, columns))
    assert found in every_path(rows, columns)
    assert sum(costs[at] for at in found) == least


@given(CUTS, CUTS)
def test_pieces_are_what_lies_between_the_ends_that_both_sides_have(
    one: list[int], two: list[int]
) -> None:
    ours = np.cumsum(one).tolist()
    theirs = np.cumsum(two).tolist()
    common = sorted(({*ours} & {*theirs}) - {0})
    expected = []
    for low, high in pairwise([0, *common]):
        mine = [i for i, end in enumerate(ours) if low < end <= high]
        other = [j for j, end in enumerate(theirs) if low < end <= high]
        # White space behind the last word ends there too, and is in no piece.
        last = mine[0] + [ours[i] for i in mine].index(high)
        last_other = other[0] + [theirs[j] for j in other].index(high)
        expected.append(Piece(range(mine[0], last + 1), range(other[0], last_other + 1)))
    assert pieces(ours, theirs) == expected


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([3, 7], [3, 7], [Piece(range(1), range(1)), Piece(range(1, 2), range(1, 2))]),
        ([7], [3, 7], [Piece(range(1), range(2))]),
        ([2, 5, 7], [3, 5], [Piece(range(2), range(2))]),
        ([3, 3, 7], [0, 3, 7], [Piece(range(1), range(1, 2)), Piece(range(2, 3), range(2, 3))]),
        ([], [1], []),
    ],
)
def test_pieces_of_a_few_texts(ours: list[int], theirs: list[int], expected: list[Piece]) -> None:
    assert pieces(ours, theirs) == expected


def test_tokens_of_a_piece_are_paired_by_edit_distance() -> None:
    words = ["ab", "cde", "f", "abc", "def"]
    ours = Tokenized(np.array([0, 1, 2]), np.array([2, 5, 6]))
    theirs = Tokenized(np.array([3, 4]), np.array([3, 6]))

    def distance(one: int, two: int) -> float:
        return float(len({*words[one]} ^ {*words[two]}))

    found = pieces(ours.ends.tolist(), theirs.ends.tolist())
    assert token_pairs(found, ours, theirs, distance) == [(3, 0), (4, 1), (4, 2)]
