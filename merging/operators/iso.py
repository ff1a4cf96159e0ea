"""Iso-C and Iso-CTS: the directions of the summed task vectors, all with the same strength.

Marczak 2025, "No task left behind: isotropic model merging with common and task-specific
subspaces". Per matrix, with Σ_k τ_k = U Σ Vᵀ and the mean σ̄ of its singular values:

* Iso-C: merged = base + σ̄ U Vᵀ. As σ̄ U Vᵀ = P Σ_k τ_k with P = U diag(σ̄ / σ_i) Uᵀ, every expert
  has a row P τ_k of its own.
* Iso-CTS: the largest of the common directions U_c, and with them the largest of every (I − U_c
  U_cᵀ) τ_k; both sides are replaced by their polar factors Û and V̂, and all singular values by
  their mean: merged = base + σ̄ Û V̂ᵀ. There is one row, as no split by experts is natural.

Only singular values that are numerically not zero are flattened. The published formula also
strengthens directions in which no expert moves, which are arbitrary; in a sum of LoRA experts those
are nearly all. Weights that were merged with LoRA and then rounded (to bf16, say) move a little in
all directions: ``floor`` leaves those out.

The default coefficient 1.5 is the one with which FusionBench reports both for eight CLIP experts;
the paper tunes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.decomposition import Svd, decompose, numerical_rank
from mergesearch.merging.operators.parts.matrices import (
    Convolutions,
    Decompositions,
    Fused,
    Matrices,
    Others,
    Selection,
    rows_by_matrix,
)
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.operators.parts.polar import polar
from mergesearch.merging.operators.parts.singular import left_of_sum, singular_of_sum
from mergesearch.merging.tensors.place import HOST, Place, place_of
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch

Floor = Annotated[
    float,
    Field(
        ge=0, lt=1, description="singular values up to this fraction of the largest count as zero"
    ),
]


def prepare_common(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    flatten: Annotated[
        Literal["nonzero", "all"],
        Field(
            description="singular values that are set to their mean: those that are not zero, or "
            "all, as published"
        ),
    ] = "nonzero",
    floor: Floor = 0.0,
    matrices: Matrices = "all",
    conv: Convolutions = "others",
    fused: Fused = "split",
    others: Others = "mean",
    decompositions: Decompositions = "precise",
) -> Basis:
    """``P τ_k`` for every matrix, and a share of the mean for other tensors."""
    # Where P is not defined, vectors are needed that a fast decomposition leaves out.
    fast = decompositions == "fast" and flatten == "nonzero"
    decomposed = left_of_sum if fast else singular_of_sum

    def formula(part: MatrixPart, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        svd = decomposed(base, experts, part, deltas, fast)
        rank = numerical_rank(svd.values, part.shape, deltas[0].dtype, floor=floor)
        kept = svd.top(rank)
        # σ̄ U Vᵀ = P Σ_k τ_k with P = U diag(σ̄ / σ_i) Uᵀ: the rows are P τ_k
        if flatten == "nonzero":
            return levelled(kept, float(kept.values.sum()) / max(rank, 1), deltas, fast)
        mean = float(svd.values.mean())
        # P is not defined where σ_i = 0: σ̄ U Vᵀ of those directions is shared equally
        rest = svd.left[:, rank:] @ svd.right[rank:] * (mean / len(deltas))
        return [row + rest for row in levelled(kept, mean, deltas, fast)]

    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused, others=others)
    return Basis("delta", len(experts), rows_by_matrix(base, experts, selection, formula))


def levelled(
    common: Svd, mean: float, deltas: Sequence[torch.Tensor], fast: bool = False
) -> list[torch.Tensor]:
    """``U diag(σ̄ / σ_i) Uᵀ τ_k`` for every task vector ``(m, n)``; no σ_i may be 0.

    ``fast`` multiplies in the order of fewest operations.
    """
    gain = (mean / common.values)[:, None]
    m, rank = common.left.shape
    columns = sum(delta.shape[1] for delta in deltas)
    if fast and m * (rank + columns) < 2 * rank * columns:
        whole = common.left @ (gain * common.left.T)  # P
        return [whole @ delta.to(whole.dtype) for delta in deltas]
    return [
        common.left @ (gain * (common.left.T @ delta.to(common.left.dtype))) for delta in deltas
    ]


def prepare_common_and_specific(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    common: Annotated[
        float, Field(gt=0, le=1, description="fraction of the directions that are common ones")
    ] = 0.8,
    floor: Floor = 0.0,
    matrices: Matrices = "all",
    conv: Convolutions = "others",
    fused: Fused = "split",
    others: Others = "mean",
    decompositions: Decompositions = "precise",
) -> Basis:
    """The merged task vector as one row: isotropic for matrices, the mean of other tensors."""
    fast = decompositions == "fast"

    def formula(part: MatrixPart, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        dtype = deltas[0].dtype
        shape = part.shape
        shared, each = directions_of(min(shape), len(deltas), common)
        svd = singular_of_sum(base, experts, part, deltas, fast)
        first = svd.top(min(shared, numerical_rank(svd.values, shape, dtype, floor=floor)))
        place = place_of(base)
        own = [specific(first, delta, each, floor, part.draws(), place, fast) for delta in deltas]
        return [isotropic([first, *own], dtype, place, fast)]

    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused, others=others)
    return Basis("delta", 1, rows_by_matrix(base, experts, selection, formula, one_row=True))


def directions_of(total: int, experts: int, common: float) -> tuple[int, int]:
    """Number of common directions, and of those of each expert.

    The number of those that are not common is rounded to a multiple of the number of experts, with
    halves to even as in the authors' code.
    """
    specific = total - math.floor(Fraction(repr(common)) * total)
    each = min(round(specific / experts), total // experts)
    return total - each * experts, each


def specific(
    first: Svd,
    delta: torch.Tensor,
    count: int,
    floor: float,
    draws: torch.Generator | None = None,
    place: Place = HOST,
    fast: bool = False,
) -> Svd:
    """The ``count`` largest singular vectors of ``(I − U_c U_cᵀ) τ_k``.

    Those that are only rounding are left out.

    Args:
        first: The common directions.
        delta: τ_k, ``(m, n)``.
        count: How many are wanted.
        floor: Singular values up to this fraction of the norm of τ_k count as zero.
        draws: See :func:`decompose`.
        place: See :func:`decompose`.
        fast: See :func:`decompose`.
    """
    wide = delta.to(first.left.dtype)
    rest = wide - first.left @ (first.left.T @ wide)
    svd = decompose(rest, max(count, 1), draws, place, fast=fast)
    # Relative to the norm of τ_k itself: of a low-rank one, only rounding may be left.
    rank = numerical_rank(svd.values, delta.shape, delta.dtype, floor=floor, largest=wide.norm())
    return svd.top(min(count, rank))


def isotropic(
    pieces: Sequence[Svd], dtype: torch.dtype, place: Place = HOST, fast: bool = False
) -> torch.Tensor:
    """``σ̄ Û V̂ᵀ`` with the polar factors of all left and right singular vectors, ``(m, n)``."""
    import torch

    left = polar(torch.cat([svd.left for svd in pieces], dim=1), dtype, place, fast)
    right = polar(torch.cat([svd.right for svd in pieces], dim=0), dtype, place, fast)
    values = torch.cat([svd.values for svd in pieces])
    return left @ right * (values.sum() / max(len(values), 1))


ISO_C = Operator(
    name="iso_c",
    prepare=prepare_common,
    summary="the directions of the summed task vectors, all with the same strength",
    paper="Marczak 2025, No task left behind: isotropic model merging (Iso-C)",
    family="spectral",
    scope="T",
    identities=frozenset({"base_at_zero", "permutation", "linearity", "homogeneity"}),
    default=lambda _experts, _options: 1.5,
    bounds=lambda _experts, _options: (0.3, 3.0),
    # Task vectors, rows of matrices and of tensors; one decomposition and its work space.
    copies=lambda experts: 3 * experts + 10,
    when="for related tasks with nothing but weights, where a few directions outweigh the rest",
)

ISO_CTS = Operator(
    name="iso_cts",
    prepare=prepare_common_and_specific,
    summary="common directions and those of single experts, all with the same strength",
    paper="Marczak 2025, No task left behind: isotropic model merging (Iso-CTS)",
    family="spectral",
    scope="T",
    identities=frozenset({"base_at_zero", "permutation", "linearity", "homogeneity"}),
    default=lambda _experts, _options: 1.5,
    bounds=lambda _experts, _options: (0.3, 3.0),
    directions=lambda _experts, _options: 1,
    # Task vectors, three decompositions, and the work space of one in fp64 if need be.
    copies=lambda experts: experts + 20,
    when="as `iso_c`, for many tasks, each with directions of its own",
)
