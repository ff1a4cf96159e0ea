"""KnOTS: merge in coordinates that all experts share.

Stoica 2025, "Model merging with SVD to tie the KnOTS". Low-rank experts (LoRA) change few
directions, and each its own: element by element they hardly meet, so that TIES and DARE have
nothing to resolve. Put side by side, [τ_1 ... τ_K] = U Σ [V_1 ... V_K], and another method X merges
the coordinates Σ V_k: merged = base + U X(Σ V_1, ..., Σ V_K). With X = task arithmetic nothing
changes.

Here Σ V_k is worked out as Uᵀ τ_k, which needs no V. Coordinates are trimmed tensor by tensor,
where the authors' code ranks those of all layers together; weights and biases are not joined into
one matrix; singular values are dropped below what is numerically zero instead of below 1e-5, and
coordinates that are only rounding errors are set to 0, for they would take part in the means of
TIES.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.dare import Drop, survivors
from mergesearch.merging.operators.parts.decomposition import Svd, numerical_rank
from mergesearch.merging.operators.parts.election import Fractional, Seed, elect, one_minus
from mergesearch.merging.operators.parts.magnitudes import keep_largest
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
from mergesearch.merging.operators.parts.singular import singular_side_by_side
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch

#: The method X that merges coordinates.
Inner = Literal["ties", "dare_ties", "task_arithmetic"]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    inner: Annotated[Inner, Field(description="what merges the shared coordinates")] = "ties",
    density: Annotated[
        Fractional, Field(description="fraction of coordinates that ties keeps")
    ] = 0.2,
    drop: Annotated[
        Drop, Field(description="probability with which dare_ties drops a coordinate")
    ] = 0.1,
    seed: Seed = 0,
    matrices: Matrices = "all",
    conv: Convolutions = "others",
    fused: Fused = "split",
    others: Others = "mean",
    decompositions: Decompositions = "precise",
) -> Basis:
    """``U X_k(Σ V_k)`` for every matrix, and a share of the mean for other tensors."""
    names = [expert.name for expert in experts]
    fast = decompositions == "fast"

    def formula(part: MatrixPart, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        svd = singular_side_by_side(base, experts, part, deltas, fast)
        joined = (part.shape[0], part.shape[1] * len(experts))
        rank = numerical_rank(svd.values, joined, deltas[0].dtype)
        left = svd.left[:, :rank]
        without = left.shape[1] < rank  # U is larger than all task vectors, and not worked out
        kept = svd.top(rank) if without else svd
        if without:
            shared = _from_right(kept, deltas)
        else:
            shared = [coordinates(left, delta) for delta in deltas]  # Σ V_k = Uᵀ τ_k
        if inner == "ties":
            shared = elect([keep_largest(one, density) for one in shared])
        elif inner == "dare_ties":
            label = f"{part.name} row {part.start}"
            shared = elect(
                [
                    survivors(one, seed, expert, label, one_minus(drop), "inverse_prob")
                    for one, expert in zip(shared, names, strict=True)
                ]
            )
        if without:
            return [_of_coordinates(kept, deltas, one) for one in shared]
        return [left @ one for one in shared]  # U X_k(Σ V_k)

    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused, others=others)
    return Basis("delta", len(experts), rows_by_matrix(base, experts, selection, formula))


def coordinates(left: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """``Uᵀ τ``, ``(r, n)`` for ``left`` of ``(m, r)``, with rounding errors set to 0."""
    return _without_noise(left.T @ delta.to(left.dtype), delta)


def _without_noise(coordinates: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The coordinates of a task vector, with rounding errors set to 0 in place."""
    import torch

    # A few roundings, and still far below the usual coordinate, ‖τ‖ / sqrt(r n), of the largest
    # matrices.
    noise = 16 * torch.finfo(delta.dtype).eps * float(delta.norm())
    return coordinates.masked_fill_(coordinates.abs() <= noise, 0.0)


def _from_right(svd: Svd, deltas: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``Σ V_k``, the columns of ``Σ Vᵀ`` that belong to each task vector."""
    import torch

    parts = torch.split(svd.right, deltas[0].shape[1], dim=1)
    return [
        _without_noise(svd.values[:, None] * part, delta)
        for part, delta in zip(parts, deltas, strict=True)
    ]


def _of_coordinates(svd: Svd, deltas: Sequence[torch.Tensor], merged: torch.Tensor) -> torch.Tensor:
    """``U X`` for ``U = [τ_1 ... τ_K] V Σ⁻¹`` and coordinates X, ``(r, n)``."""
    import torch

    inside = torch.split(svd.right.T @ (merged / svd.values[:, None]), deltas[0].shape[1])
    result = deltas[0].to(merged.dtype) @ inside[0]
    for delta, part in zip(deltas[1:], inside[1:], strict=True):
        result.addmm_(delta.to(merged.dtype), part)
    return result


def _default(_experts: int, options: Options) -> float:
    # Those of the authors' configurations for eight vision experts of rank 16; task arithmetic's
    # own.
    return {"ties": 0.6, "dare_ties": 0.7, "task_arithmetic": 0.3}[options["inner"]]


def _bounds(_experts: int, options: Options) -> tuple[float, float]:
    return {"ties": (0.0, 1.6), "dare_ties": (0.0, 1.2), "task_arithmetic": (0.0, 1.5)}[
        options["inner"]
    ]


KNOTS = Operator(
    name="knots",
    prepare=prepare,
    summary="merge in the singular coordinates that all experts share, with TIES or DARE",
    paper="Stoica 2025, Model merging with SVD to tie the KnOTS",
    family="spectral",
    scope="T",
    identities=frozenset({"base_at_zero", "permutation", "linearity", "homogeneity"}),
    plain={"inner": "task_arithmetic", "others": "sum"},
    plain_identities=frozenset(
        {
            "base_at_zero",
            "expert_near_one_hot",
            "single_expert",
            "permutation",
            "linearity",
            "homogeneity",
            "zero_vector",
            "default_ignores_zero_vector",
        }
    ),
    default=_default,
    bounds=_bounds,
    # Task vectors, coordinates, and rows of matrices and of tensors; one decomposition, or one
    # election.
    copies=lambda experts: 4 * experts + 10,
    stochastic=True,
    when="for LoRA experts, before TIES or DARE",
)
