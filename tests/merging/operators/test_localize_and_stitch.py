"""Localize-and-Stitch against its two steps written out over the flat model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergesearch.merging import merge

Array = npt.NDArray[np.float64]

SHAPES = {"layers.0.w.weight": (7, 9), "layers.0.w.bias": (7,), "head.weight": (4, 7)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())


def state(flat: Array) -> dict[str, torch.Tensor]:
    parts = np.split(flat, np.cumsum([np.prod(shape) for shape in SHAPES.values()])[:-1])
    return {
        name: torch.tensor(part.reshape(shape))
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


def flat(tensors: dict[str, torch.Tensor]) -> Array:
    return np.concatenate([tensors[name].numpy().ravel() for name in SHAPES])


def written_out(tau: Array, density: float) -> Array:
    """Masks of the largest magnitudes, their average on overlaps, and the sum."""
    count = int(np.ceil(density * tau.shape[1]))
    masks = np.zeros_like(tau)
    for mask, vector in zip(masks, tau, strict=True):
        mask[np.argsort(-np.abs(vector))[:count]] = 1
    overlap = masks.sum(axis=0)
    shares = np.divide(masks, overlap, out=np.zeros_like(masks), where=overlap > 0)
    return np.asarray((shares * tau).sum(axis=0))


@pytest.mark.parametrize("density", [0.05, 0.1, 0.4, 1.0])
def test_is_the_two_steps(density: float) -> None:
    generator = np.random.default_rng(0)
    # Some positions matter to all, so that regions overlap.
    tau = generator.normal(size=(4, SIZE)) * generator.exponential(size=SIZE)
    base = generator.normal(size=SIZE)
    experts = {f"task{k}": state(base + vector) for k, vector in enumerate(tau)}
    merged = merge(state(base), experts, operator="localize_and_stitch", density=density)
    assert np.allclose(flat(merged) - base, written_out(tau, density), rtol=0, atol=1e-12)


def test_regions_that_do_not_overlap_get_their_experts_weights() -> None:
    base = {"layers.0.w.weight": torch.zeros(2, 5)}
    one = {"layers.0.w.weight": torch.tensor([[9.0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])}
    other = {"layers.0.w.weight": torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 1, -9]])}
    merged = merge(base, [one, other], operator="localize_and_stitch", density=0.1)
    assert merged["layers.0.w.weight"].tolist() == [[9, 0, 0, 0, 0], [0, 0, 0, 0, -9]]


def test_elements_that_did_not_change_belong_to_no_region() -> None:
    base = {"w": torch.zeros(4)}
    experts = [{"w": torch.tensor([4.0, 2, 0, 0])}, {"w": torch.tensor([0.0, 2, 0, 6])}]
    merged = merge(base, experts, operator="localize_and_stitch", density=1.0)
    assert merged["w"].tolist() == [4, 2, 0, 6]
