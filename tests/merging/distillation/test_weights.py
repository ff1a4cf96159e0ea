"""Weights of models for each text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergesearch.merging.distillation.weights import FUSIONS, selection_weights


def shares(rng: np.random.Generator, models: int = 3) -> list[list[np.ndarray]]:
    """Probabilities of right tokens on four texts, the last of which has no common place."""
    return [[rng.uniform(0.01, 1, places) for _ in range(models)] for places in (3, 1, 5, 0)]


@pytest.mark.parametrize("name", FUSIONS)
def test_weights_add_up_to_one_and_follow_from_what_is_given(name: str) -> None:
    found = shares(np.random.default_rng(0))
    weights = FUSIONS[name](found)
    assert weights.shape == (4, 3)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_array_equal(weights, FUSIONS[name](found))


@given(st.integers(0, 2**32 - 1))
def test_mince_takes_the_best_and_average_prefers_it(seed: int) -> None:
    found = shares(np.random.default_rng(seed))
    losses = [[-np.log(one).mean() for one in text] for text in found[:3]]
    best = np.argmin(losses, axis=1)
    np.testing.assert_array_equal(FUSIONS["mince"](found)[:3].argmax(axis=1), best)
    np.testing.assert_array_equal(FUSIONS["average"](found)[:3].argmax(axis=1), best)
    plain = np.exp(-np.array(losses))
    np.testing.assert_allclose(
        FUSIONS["average"](found)[:3], plain / plain.sum(axis=1, keepdims=True)
    )


def test_the_selection_predicts_better_than_equal_weights_and_leaves_no_model_out() -> None:
    rng = np.random.default_rng(1)
    good = [np.full(6, 0.6), np.full(6, 0.5), np.full(6, 0.01)]
    found = [[one * rng.uniform(0.9, 1, 6) for one in good] for _ in range(20)]
    weights = selection_weights(found)

    def nats(chosen: np.ndarray) -> float:
        return -float(
            np.mean([np.log(row @ np.stack(text)) for row, text in zip(chosen, found, strict=True)])
        )

    assert nats(weights) < nats(np.full((20, 3), 1 / 3))
    assert weights.mean(axis=0)[1] > 0.2  # without the load balance nearly all goes to the first
    assert weights.mean(axis=0)[2] < 0.1
