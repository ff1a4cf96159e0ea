"""Batches within limits of rows and tokens, and plans that are kept."""

from __future__ import annotations

import itertools

import pytest

from mergesearch.evaluators.batching import (
    ACCELERATOR_TOKENS,
    KEPT_PLANS,
    KeptPlans,
    token_batches,
    token_limit,
)


@pytest.mark.parametrize(
    ("lengths", "rows", "tokens", "sizes"),
    [
        ([], 4, None, []),
        ([9, 8, 7, 6, 5], 2, None, [2, 2, 1]),
        ([9, 8, 7, 6, 5], 64, 18, [2, 2, 1]),
        ([1, 1, 1, 9, 1], 64, 9, [3, 1, 1]),
        ([1, 2, 3, 4, 5], 3, 9, [3, 1, 1]),
        ([50, 3, 3], 64, 9, [1, 2]),
    ],
)
def test_batches_keep_both_limits(
    lengths: list[int], rows: int, tokens: int | None, sizes: list[int]
) -> None:
    batches = token_batches(lengths, rows, tokens)
    assert [len(lengths[one]) for one in batches] == sizes
    assert [n for one in batches for n in lengths[one]] == lengths


def test_every_batch_is_as_large_as_the_limits_allow() -> None:
    import numpy as np

    lengths = np.random.default_rng(0).integers(1, 40, 200).tolist()
    batches = token_batches(lengths, 8, 100)
    for one, following in itertools.pairwise(batches):
        own = lengths[one]
        assert len(own) <= 8
        assert len(own) == 1 or len(own) * max(own) <= 100
        more = [*own, lengths[following.start]]
        assert len(more) > 8 or len(more) * max(more) > 100


def test_limits_of_devices() -> None:
    assert token_limit(None, "cpu") is None
    assert token_limit(None, "cpu", halvings=3) is None
    assert token_limit(None, "cuda") == ACCELERATOR_TOKENS
    assert token_limit(None, "cuda", halvings=2) == ACCELERATOR_TOKENS // 4
    assert [token_limit(10, "cpu", halvings=n) for n in range(5)] == [10, 5, 2, 1, 1]


def test_plans_are_made_once_for_the_same_objects_and_settings() -> None:
    plans = KeptPlans[int]()
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    one, other = ("a",), ("b",)
    assert [plans.get([one, other], 1, make) for _ in range(3)] == [0, 0, 0]
    assert plans.get([other, one], 1, make) == 1
    assert plans.get([one, other], 2, make) == 2
    assert plans.get([one, other], 1, make) == 0
    for number in range(KEPT_PLANS):
        plans.get([one], number, make)
    assert len(plans.plans()) == KEPT_PLANS
    assert plans.get([other, one], 1, make) == len(made) - 1
    plans.clear()
    assert plans.plans() == []
