"""The numbers that a pack holds of one tensor of several experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergesearch.merging.export.adapter_format.low_rank import approximated
from mergesearch.merging.kernels.lowrank import matrix_shape

if TYPE_CHECKING:
    import torch


def held_numbers(
    form: str,
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    *,
    rank: int,
    directions: int,
    thresholds: Sequence[float],
) -> dict[str, torch.Tensor]:
    """Numbers by kind, as :mod:`mergesearch.merging.checkpoints.pack_files` lists them.

    Args:
        form: ``whole``, ``masked``, ``factors`` or ``basis``.
        base: The base's tensor.
        experts: Those of K experts.
        rank: Terms r of low-rank task vectors.
        directions: Directions P of a basis.
        thresholds: λ of each expert's mask.
    """
    import torch

    if form == "whole":
        wide = experts[0].dtype if len({one.dtype for one in experts}) == 1 else torch.float32
        return {"whole": torch.stack([one.to(wide) for one in experts])}
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    vectors = [one.to(wide) - base.to(wide) for one in experts]
    if form == "masked":
        return _masked(vectors, thresholds)
    factors = _factors(vectors, rank)
    if form == "factors":
        return factors
    left = _basis("left", factors["left"], directions)
    return left | _basis("right", factors["right"].transpose(1, 2), directions)


def _masked(
    vectors: Sequence[torch.Tensor], thresholds: Sequence[float]
) -> dict[str, torch.Tensor]:
    """The sum of K task vectors, and their packed masks ``(K, bytes)``."""
    import torch

    total = sum(vectors[1:], start=vectors[0])
    masks = []
    for vector, threshold in zip(vectors, thresholds, strict=True):
        # m_t = [|τ_t| > λ_t |τ_MTL − τ_t|]
        mask = vector.abs() > threshold * (total - vector).abs()
        masks.append(np.packbits(mask.reshape(-1).numpy()))
    return {"sum": total, "mask": torch.from_numpy(np.stack(masks))}


def _factors(vectors: Sequence[torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The best products of rank r: ``(K, m, r)`` and ``(K, r, n)``."""
    import torch

    m, n = matrix_shape(vectors[0].shape)
    changes = [approximated(vector.reshape(m, n), rank) for vector in vectors]
    return {
        "left": torch.stack([change.left for change in changes]),
        "right": torch.stack([change.right for change in changes]),
    }


def _basis(side: str, factors: torch.Tensor, directions: int) -> dict[str, torch.Tensor]:
    """Mean and principal directions over experts of the r numbers at each position.

    Args:
        side: ``left`` or ``right``.
        factors: ``(K, positions, r)``.
        directions: P.
    """
    import torch

    points = factors.permute(1, 2, 0).double()  # (positions, r, K)
    mean = points.mean(dim=2, keepdim=True)
    u, values, v = torch.linalg.svd(points - mean, full_matrices=False)
    kept = min(directions, u.shape[2])
    basis = points.new_zeros((len(points), directions, points.shape[1]))
    shares = points.new_zeros((len(points), directions, points.shape[2]))
    basis[:, :kept] = u[:, :, :kept].transpose(1, 2)
    shares[:, :kept] = values[:, :kept, None] * v[:, :kept]
    return {
        f"{side}.mean": mean[:, :, 0],
        f"{side}.directions": basis,
        f"{side}.shares": shares,
    }
