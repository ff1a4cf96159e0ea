"""Alignment, common subspaces, low rank and sparse, against numpy and by their mathematics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergesearch.merging.mixture.layers import ExpertWeights
from mergesearch.merging.mixture.weights import (
    factor_bytes,
    in_order,
    low_rank_and_sparse,
    neuron_order,
    shares,
    union_subspace_mean,
    weighted_mean,
)


def expert(seed: int, inner: int = 7, width: int = 5) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return ExpertWeights(draw(inner, width), draw(inner, width), draw(width, inner))


def aligned(own: ExpertWeights, reference: ExpertWeights) -> ExpertWeights:
    return in_order(own, neuron_order(own, reference))


def matrices(count: int, shape: tuple[int, int] = (4, 6)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_alignment_finds_the_order_of_neurons_again() -> None:
    reference = expert(1)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    moved = ExpertWeights(reference.gate[order], reference.up[order], reference.down[:, order])
    back = aligned(moved, reference)
    assert torch.equal(back.gate, reference.gate)
    assert torch.equal(back.up, reference.up)
    assert torch.equal(back.down, reference.down)


def test_alignment_does_not_change_what_an_expert_computes() -> None:
    own = expert(2)
    back = aligned(own, expert(3))
    assert not torch.equal(back.gate, own.gate)
    inputs = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))

    def output(e: ExpertWeights) -> torch.Tensor:
        return (torch.nn.functional.silu(inputs @ e.gate.T) * (inputs @ e.up.T)) @ e.down.T

    torch.testing.assert_close(output(back), output(own))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_union_subspace_is_the_papers_formula(share: float) -> None:
    tensors = matrices(3)
    weights = [0.5, 0.2, 0.3]
    left, values, right = np.linalg.svd(np.hstack([t.numpy() for t in tensors]).astype(np.float64))
    rank = round(share * 4)
    parts = [right[:rank, 6 * k : 6 * k + 6] for k in range(3)]
    mean = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    expected = left[:, :rank] @ np.diag(values[:rank]) @ mean
    np.testing.assert_allclose(
        union_subspace_mean(tensors, weights, share).numpy(), expected, atol=1e-6
    )


def test_union_subspace_without_truncation_is_the_weighted_mean_bit_for_bit() -> None:
    tensors = matrices(3)
    weights = [0.5, 0.2, 0.3]
    found = union_subspace_mean(tensors, weights, 1.0)
    assert torch.equal(found, weighted_mean(tensors, weights))
    assert not torch.equal(union_subspace_mean(tensors, weights, 0.75), found)


def test_low_rank_and_sparse_keeps_the_largest_of_the_rest() -> None:
    (matrix,) = matrices(1)
    left, values, right = np.linalg.svd(matrix.numpy().astype(np.float64), full_matrices=False)
    low = left[:, :2] @ np.diag(values[:2]) @ right[:2]
    rest = matrix.numpy() - low
    limit = np.sort(np.abs(rest).ravel())[-6]
    expected = low + np.where(np.abs(rest) >= limit, rest, 0)
    np.testing.assert_allclose(low_rank_and_sparse(matrix, 0.5, 0.25).numpy(), expected, atol=1e-6)


def test_all_singular_values_give_the_matrix_back() -> None:
    (matrix,) = matrices(1)
    torch.testing.assert_close(low_rank_and_sparse(matrix, 1.0, 0.0), matrix)


def test_bytes_of_factors_count_both_factors_and_places_of_entries() -> None:
    assert factor_bytes((4, 6), 0.5, 0.25, 2) == 2 * (4 + 6) * 2 + 6 * (2 + 4)


def test_usage_becomes_weights_that_sum_to_one() -> None:
    assert shares(np.array([1.0, 3.0])) == [0.25, 0.75]
    assert shares(np.array([0.0, 0.0])) == [0.5, 0.5]
