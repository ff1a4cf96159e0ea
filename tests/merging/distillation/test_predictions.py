"""Predictions in other tokens: they stay probabilities, and agree with plain sums."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from mergesearch.merging.distillation.pairing import Piece
from mergesearch.merging.distillation.predictions import (
    LEAST,
    Predictions,
    gathered,
    given,
    mixed,
    only_where,
    share_of,
    translated,
)
from mergesearch.merging.distillation.token_maps import (
    MOST,
    count_pairs,
    in_proportion,
    most_frequent,
    nearest_texts,
    token_map,
)

SEEDS = st.integers(0, 2**32 - 1)


def drawn_predictions(rng: np.random.Generator, tokens: int, size: int, kept: int) -> Predictions:
    ids = np.stack([rng.choice(size, kept, replace=False) for _ in range(tokens)])
    shares = rng.dirichlet(np.ones(kept), tokens).astype(np.float32)
    return Predictions(ids, shares, np.ones(tokens, dtype=bool))


@drawn(SEEDS)
def test_equal_ids_are_added_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 5, (4, 9))
    shares = rng.random((4, 9)).astype(np.float32)
    found, sums = gathered(ids, shares, 5)
    for row in range(4):
        plain: Counter[int] = Counter()
        for one, share in zip(ids[row].tolist(), shares[row].tolist(), strict=True):
            plain[one] += share
        total = sum(plain.values())
        told = {
            int(one): float(share)
            for one, share in zip(found[row], sums[row], strict=True)
            if share > 0
        }
        assert told == pytest.approx({one: share / total for one, share in plain.items()})


@drawn(SEEDS, st.booleans())
def test_translations_and_mixtures_stay_probabilities(seed: int, starts: bool) -> None:
    rng = np.random.default_rng(seed)
    theirs = drawn_predictions(rng, 4, 12, 5)
    rows = {one: in_proportion(Counter(rng.integers(0, 6, 7).tolist())) for one in range(0, 12, 2)}
    mapping = token_map(rows, range(12), ["", *"abcdefghijk"], [*"cdexyz"], {})
    found = [
        Piece(range(1), range(1)),
        Piece(range(1, 3), range(1, 2)),
        Piece(range(3, 4), range(2, 4)),
    ]
    tokens = rng.integers(0, 6, 5)
    told = translated(theirs, found, tokens, mapping, starts=starts)
    assert told.known.tolist() == (
        [True, True, False, True, False] if starts else [True, *[False] * 4]
    )
    ours = drawn_predictions(rng, 5, 6, 3)
    for one in (told, mixed([ours, told], [0.3, 0.7], 4), given(tokens)):
        np.testing.assert_allclose(one.shares.sum(axis=1), 1, rtol=1e-5)
        assert (one.shares >= 0).all()
    # What nothing is known of is the token itself.
    assert (told.ids[~told.known, 0] == tokens[~told.known]).all()


def test_a_translation_is_the_plain_sum_over_the_map() -> None:
    theirs = Predictions(
        np.array([[0, 1, 2]]), np.array([[0.5, 0.3, 0.2]], np.float32), np.ones(1, bool)
    )
    mapping = token_map({0: {4: 1.0}, 1: {4: 0.5, 3: 0.5}, 2: {2: 1.0}}, (), [""] * 3, [""] * 5, {})
    told = translated(theirs, [Piece(range(1), range(1))], np.array([2]), mapping, starts=False)
    assert dict(zip(told.ids[0].tolist(), told.shares[0].tolist(), strict=True)) == pytest.approx(
        {4: 0.65, 3: 0.15, 2: 0.2}
    )


def test_mixtures_weigh_and_leave_out() -> None:
    one = given(np.array([1, 2]))
    two = given(np.array([1, 3]))
    both = mixed([one, two], [0.25, 0.75], 2)
    np.testing.assert_allclose(share_of(both, np.array([1, 3])), [1, 0.75])
    alone = mixed([one, two], [0, 1], 2)
    np.testing.assert_allclose(share_of(alone, np.array([1, 2])), [1, LEAST])


def test_where_nothing_is_told_the_token_itself_is_expected() -> None:
    own = drawn_predictions(np.random.default_rng(0), 2, 6, 3)
    kept = only_where(np.array([True, False]), own, np.array([5, 4]))
    assert kept.known.tolist() == [True, False]
    np.testing.assert_array_equal(kept.shares[0], own.shares[0])
    np.testing.assert_array_equal(kept.ids[0], own.ids[0])
    assert (kept.ids[1, 0], kept.shares[1].tolist()) == (4, [1, 0, 0])


def test_statistics_of_pairs() -> None:
    counts = count_pairs([(0, 5), (0, 4), (0, 5), (1, 3), (1, 2)])
    assert {one: most_frequent(row) for one, row in counts.items()} == {0: {5: 1.0}, 1: {2: 1.0}}
    assert in_proportion(counts[0]) == {5: 2 / 3, 4: 1 / 3}
    many = in_proportion(Counter(dict.fromkeys(range(20), 1)))
    assert len(many) == MOST
    assert sum(many.values()) == pytest.approx(1)


@drawn(st.lists(st.text("abc ", max_size=4), min_size=1, max_size=6), st.text("abc ", max_size=4))
def test_the_nearest_text_is_the_nearest(texts: list[str], wanted: str) -> None:
    (found,) = nearest_texts([wanted], texts)
    candidates = [index for index, text in enumerate(texts) if text]
    if not wanted or not candidates:
        assert found == -1
    else:
        assert found == min(candidates, key=lambda index: (edits(wanted, texts[index]), index))


def edits(one: str, two: str) -> int:
    """Edit distance, by its definition."""
    if not one or not two:
        return len(one) + len(two)
    return min(
        edits(one[1:], two[1:]) + (one[0] != two[0]),
        edits(one[1:], two) + 1,
        edits(one, two[1:]) + 1,
    )
