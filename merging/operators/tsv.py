"""TSV-Merge: the largest singular vectors of every expert, made orthogonal to each other's.

Gargiulo 2025, "Task singular vectors: reducing task interference in model merging". Per matrix:

1. Keep the r = ⌊min(m, n) / K⌋ largest singular values of every τ_k ≈ U_k Σ_k V_kᵀ.
2. Put them side by side, U = [U_1 ... U_K] and V = [V_1 ... V_K].
3. Replace U and V by their polar factors Û and V̂ (PQᵀ of the decomposition PDQᵀ).
4. merged = base + Û Σ V̂ᵀ, a sum Σ_k Û_k Σ_k V̂_kᵀ over experts, so that each keeps a coefficient.

Singular vectors that belong to numerically zero singular values are left out before
orthogonalising. The authors' code keeps them: for an unchanged expert, or a low-rank one, they are
arbitrary and displace directions of the others. For the same reason the polar factors span no more
than U and V do: K copies of an expert merge to that expert's largest singular vectors instead of to
arbitrary ones. The rank r is worked out in integers; the authors' ``int(s * (1 / K))`` falls one
short for some K. A rank of zero is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.decomposition import Svd, numerical_rank
from mergesearch.merging.operators.parts.matrices import (
    Convolutions,
    Decompositions,
    Fused,
    Matrices,
    Others,
    Selection,
    rows_by_matrix,
    spectral_refuse,
)
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.operators.parts.polar import polar
from mergesearch.merging.operators.parts.singular import singular
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.place import HOST, Place, place_of
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    rank: Annotated[
        Literal["share", "full"],
        Field(
            description="singular vectors of each expert: a K-th of them, or all (the lossless "
            "variant)"
        ),
    ] = "share",
    matrices: Matrices = "all",
    conv: Convolutions = "others",
    fused: Fused = "split",
    others: Others = "mean",
    decompositions: Decompositions = "precise",
) -> Basis:
    """``Û_k Σ_k V̂_kᵀ`` for every matrix, and a share of the mean for other tensors."""
    fast = decompositions == "fast"

    def formula(part: MatrixPart, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        # r = ⌊min(m, n) / K⌋; 1 for the keys of few heads, of which the layout alone cannot know
        share = max(1, min(part.shape) // len(experts)) if rank == "share" else None
        svds = [
            singular(base, expert, part, delta, share, fast)
            for expert, delta in zip(experts, deltas, strict=True)
        ]
        dtype = deltas[0].dtype
        return orthogonalised(
            [svd.top(numerical_rank(svd.values, part.shape, dtype)) for svd in svds],
            dtype,
            place_of(base),
            fast,
        )

    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused, others=others)
    return Basis("delta", len(experts), rows_by_matrix(base, experts, selection, formula))


def orthogonalised(
    experts: Sequence[Svd], dtype: torch.dtype, place: Place = HOST, fast: bool = False
) -> list[torch.Tensor]:
    """``Û_k Σ_k V̂_kᵀ`` for every expert, ``(m, n)`` each.

    Args:
        experts: Decompositions U_k Σ_k V_kᵀ.
        dtype: Of the task vectors.
        place: Where large polar factors are worked out.
        fast: See :func:`polar`.
    """
    import torch

    # Û and V̂, the polar factors of [U_1 ... U_K] and [V_1 ... V_K]
    left = polar(torch.cat([svd.left for svd in experts], dim=1), dtype, place, fast)
    right = polar(torch.cat([svd.right for svd in experts], dim=0), dtype, place, fast)
    ranks = [len(svd.values) for svd in experts]
    blocks = zip(
        torch.split(left, ranks, dim=1), experts, torch.split(right, ranks, dim=0), strict=True
    )
    return [u * svd.values @ v for u, svd, v in blocks]


def _refuse(layout: Layout, experts: int, options: Options) -> str | None:
    def objection(shape: tuple[int, int]) -> str | None:
        if options["rank"] == "full" or experts <= min(shape):
            return None
        return (
            f"expected at least one singular vector for each of {experts} experts, received a "
            f"matrix {shape} of {min(shape)}; merge fewer experts, or choose matrices='blocks' "
            "(leaves out heads) or rank='full'"
        )

    return spectral_refuse(layout, options, objection)


TSV = Operator(
    name="tsv",
    prepare=prepare,
    summary="the largest singular vectors of every expert, made orthogonal to each other's",
    paper="Gargiulo 2025, Task singular vectors",
    family="spectral",
    scope="T",
    identities=frozenset(
        {"base_at_zero", "single_expert", "permutation", "linearity", "homogeneity"}
    ),
    plain={"rank": "full"},
    plain_identities=frozenset(
        {
            "base_at_zero",
            "single_expert",
            "identical_experts",
            "permutation",
            "linearity",
            "homogeneity",
        }
    ),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.3, 2.0),
    refuse=_refuse,
    # For rank "full": task vectors, K pairs of factors, their joins, and the decomposition of one
    # of those in fp64 if need be. "share" holds about a third of that.
    copies=lambda experts: 9 * experts + 12,
    when="for many tasks with nothing but weights, where their directions collide",
)
