"""Arithmetic on the weights of experts: order of their neurons, means, common subspaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergesearch.merging.mixture.layers import ExpertWeights
from mergesearch.merging.mixture.statistics import Numbers

if TYPE_CHECKING:
    import torch

    Matrices = Sequence[torch.Tensor]


def by_projection(
    combine: Callable[[Matrices], torch.Tensor], experts: Sequence[ExpertWeights]
) -> ExpertWeights:
    """One expert whose gate, up and down projection are combined from those of several."""
    return ExpertWeights(
        combine([expert.gate for expert in experts]),
        combine([expert.up for expert in experts]),
        combine([expert.down for expert in experts]),
    )


def wide(expert: ExpertWeights) -> ExpertWeights:
    """The same weights in fp32 or wider."""
    import torch

    def widen(tensors: Matrices) -> torch.Tensor:
        return tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32))

    return by_projection(widen, [expert])


def stored_like(expert: ExpertWeights, like: ExpertWeights) -> ExpertWeights:
    """The weights rounded to the dtypes of another expert."""
    return ExpertWeights(
        expert.gate.to(like.gate.dtype),
        expert.up.to(like.up.dtype),
        expert.down.to(like.down.dtype),
    )


def neuron_order(expert: ExpertWeights, reference: ExpertWeights) -> torch.Tensor:
    """The order of an expert's neurons that resembles a reference most: int64 ``(inner,)``.

    A neuron is a row of the gate, the same row of the up projection, and a column of the down
    projection; the gain of a pair is the sum of the three inner products. The order is the best
    of all (a linear assignment). Li 2024, "Merge, Then Compress".
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    gains = (
        reference.gate @ expert.gate.T + reference.up @ expert.up.T + reference.down.T @ expert.down
    )
    order = linear_sum_assignment(gains.double().cpu().numpy(), maximize=True)[1]
    return torch.from_numpy(np.asarray(order, np.int64))


def in_order(expert: ExpertWeights, order: torch.Tensor) -> ExpertWeights:
    """The same expert with its neurons in another order."""
    return ExpertWeights(expert.gate[order], expert.up[order], expert.down[:, order])


def shares(usage: Numbers) -> list[float]:
    """Usage as weights that sum to one; equal ones where nothing was used."""
    total = float(usage.sum())
    if total <= 0:
        return [1 / len(usage)] * len(usage)
    return [float(value) / total for value in usage]


def shifted(weights: Sequence[float], added: Sequence[float]) -> list[float]:
    """Weights with something added to each: ``w_k (1 - Σ c) + c_k``, which still sum to one."""
    rest = 1 - sum(added)
    return [weight * rest + more for weight, more in zip(weights, added, strict=True)]


def weighted_mean(tensors: Matrices, weights: Sequence[float]) -> torch.Tensor:
    """``Σ w_k W_k``, in double precision inside."""
    total = weights[0] * tensors[0].double()
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor.double()
    return total.to(tensors[0].dtype)


def union_subspace_mean(tensors: Matrices, weights: Sequence[float], share: float) -> torch.Tensor:
    """``U Σ V̄``: the weighted mean inside what all experts of a group have in common.

    Li 2025, "Sub-MoE", experts union decomposition: ``[W_1 ... W_K] = U Σ [V_1 ... V_K]``, of which
    the largest singular values are kept, and ``V̄`` is the weighted mean of the ``V_k``. As singular
    values times ``V_k`` are ``Uᵀ W_k``, the result is ``U Uᵀ`` times the weighted mean of the
    ``W_k``: without truncation it is that mean.

    Args:
        tensors: ``(m, n)`` each.
        weights: Summing to one.
        share: Share of the ``min(m, K n)`` singular values that is kept.
    """
    import torch

    mean = weighted_mean(tensors, weights)
    side_by_side = torch.cat([tensor.double() for tensor in tensors], dim=1)
    full = min(side_by_side.shape)
    rank = max(1, math.ceil(share * full))
    if rank >= full:
        return mean
    left = torch.linalg.svd(side_by_side, full_matrices=False)[0][:, :rank]
    inside: torch.Tensor = left @ (left.T @ mean.double())
    return inside.to(mean.dtype)


def low_rank_and_sparse(matrix: torch.Tensor, share: float, density: float) -> torch.Tensor:
    """The best matrix of a rank, and the largest entries of what it leaves.

    Li 2024, "Merge, Then Compress", without its training.

    Args:
        matrix: ``(m, n)``.
        share: Rank, as a share of ``min(m, n)``.
        density: Share of the entries that are stored beside it.
    """
    import torch

    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = rank_of(matrix.shape, share)
    low = (left[:, :rank] * values[:rank]) @ right[:rank]
    rest = matrix.double() - low
    count = math.floor(density * rest.numel())
    kept = torch.zeros_like(rest)
    if count:
        largest = torch.argsort(rest.abs().reshape(-1), descending=True, stable=True)[:count]
        kept.view(-1)[largest] = rest.reshape(-1)[largest]
    both: torch.Tensor = low + kept
    return both.to(matrix.dtype)


def rank_of(shape: Sequence[int], share: float) -> int:
    """Rank of a matrix that keeps a share of its singular values."""
    return max(1, math.ceil(share * min(shape)))


def factor_bytes(shape: Sequence[int], share: float, density: float, size: int) -> int:
    """Bytes of the factors, and of the sparse entries with a place of four bytes each."""
    entries = math.floor(density * int(np.prod(shape)))
    return rank_of(shape, share) * sum(shape) * size + entries * (size + 4)
