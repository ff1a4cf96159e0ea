"""Counter-based masks: functions of seed, names and positions alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mergesearch.merging.operators.parts import masks
from mergesearch.merging.operators.parts.masks import keep_mask, uniform_bits

GOLDEN = [[1441286014, 767129756, 985797856], [4033702625, 211517653, 4040554509]]


@pytest.mark.parametrize(
    "cuts", [[0, 50], [0, 1, 2, 50], [0, 7, 8, 9, 16, 33, 50], [0, 25, 25, 50], [3, 50]]
)
def test_bits_do_not_depend_on_how_a_range_is_cut(cuts: list[int]) -> None:
    whole = uniform_bits(5, "math", "w", 0, 50)
    parts = [uniform_bits(5, "math", "w", start, stop) for start, stop in pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole[cuts[0] :])
    assert all(part.dtype == np.uint32 for part in parts)


def test_bits_never_change() -> None:
    # Recipes name a seed: a merge made from one must be the same in every later version.
    assert uniform_bits(0, "math", "w", 0, 3).tolist() == GOLDEN[0]
    assert (
        uniform_bits(7, "code", "model.layers.0.weight", 10**10, 10**10 + 3).tolist() == GOLDEN[1]
    )


def test_seed_and_both_names_matter() -> None:
    keys = [(0, "a", "bc"), (1, "a", "bc"), (0, "ab", "c"), (0, "a", "bd"), (0, "b", "bc")]
    assert len({uniform_bits(*key, 0, 8).tobytes() for key in keys}) == len(keys)


def test_masks_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    chances = torch.linspace(0, 1, 300).reshape(20, 15)
    once = [keep_mask(3, "e", "w", (20, 15), p) for p in (0.4, chances)]
    monkeypatch.setattr(masks, "BLOCK", 32)
    assert all(
        torch.equal(keep_mask(3, "e", "w", (20, 15), p), m)
        for p, m in zip((0.4, chances), once, strict=True)
    )


def test_one_probability_is_as_many_equal_ones() -> None:
    same = torch.full((7, 9), 0.3, dtype=torch.float64)
    assert torch.equal(keep_mask(0, "e", "w", (7, 9), 0.3), keep_mask(0, "e", "w", (7, 9), same))


def test_elements_are_kept_as_often_as_asked() -> None:
    size = 200_000
    state = torch.random.get_rng_state()
    for chance in (0.05, 0.5, 0.9):
        kept = int(keep_mask(0, "e", "w", (size,), chance).sum())
        assert abs(kept - chance * size) < 5 * np.sqrt(size * chance * (1 - chance))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_certain_chances_and_small_shapes() -> None:
    assert bool(keep_mask(0, "e", "w", (1000,), 1.0).all())
    assert not bool(keep_mask(0, "e", "w", (1000,), 0.0).any())
    assert keep_mask(0, "e", "w", (), 1.0).shape == ()
    assert keep_mask(0, "e", "w", (3, 0), 0.5).shape == (3, 0)


def test_larger_chances_keep_what_smaller_ones_kept() -> None:
    small, large = (keep_mask(0, "e", "w", (5000,), chance) for chance in (0.2, 0.3))
    assert bool((large | ~small).all())
    assert int(large.sum()) > int(small.sum())
