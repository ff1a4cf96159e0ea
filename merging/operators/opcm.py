"""OPCM: experts join one after another, each cleaned of what overlaps with the merge so far.

Tang 2025, "Merging models on the fly without retraining: a sequential approach to scalable
continual model merging". With T = U Σ Vᵀ the merge so far, a new task vector τ becomes τ' = U X Vᵀ,
where X = Uᵀ τ V loses its diagonal and its upper left block X[:r, :r]; r counts the singular values
that add up to no more than α of all. Tensors that are not matrices of blocks are not cleaned. T
becomes λ_prev T + τ', rescaled so that the norm of the whole model is the mean norm of the task
vectors so far.

Two observations make this a stream and a sum over experts. λ_prev undoes the last rescaling
exactly, so that T is the plain sum of cleaned task vectors throughout, up to one factor at the end;
and cleaning does not depend on the length of T. So tensors depend on each other only through that
factor, which a first pass over the model finds; and the cleaned task vector of each expert times
that factor is its direction, with a coefficient of its own (1 reproduces OPCM).

What is removed lies in the span of T, so that the thin decomposition is enough. Vectors of
numerically zero singular values are arbitrary: nothing is removed along them, whereas the authors'
code also removes the diagonal there, and divides by zero for T = 0. At α = 1 everything inside the
span of T is removed; the authors' code then removes the diagonal only. Decompositions are made in
fp64: the diagonal belongs to single singular vectors, which fp32 leaves open to one part in a
hundred where singular values are close.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.decomposition import Svd, decompose, numerical_rank
from mergesearch.merging.operators.parts.inner_products import dot
from mergesearch.merging.operators.parts.joining import Order, joining_order, refuse_order
from mergesearch.merging.operators.parts.matrices import (
    Convolutions,
    Fused,
    Matrices,
    Selection,
    rows_by_matrix,
)
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.source import TensorSource, remembered

if TYPE_CHECKING:
    import torch


Alpha = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="share of the singular values of the merge that new experts avoid",
    ),
]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    order: Order,
    alpha: Alpha = 0.5,
    matrices: Matrices = "blocks",
    conv: Convolutions = "others",
    fused: Fused = "split",
) -> Basis:
    """The cleaned task vectors, scaled so that their sum has the mean norm of the task vectors.

    Raises:
        RecipeError: If ``order`` does not hold the name of every expert once.
    """
    cleaned, factor = _cleaned_and_factor(base, experts, order, alpha, matrices, conv, fused)
    return Basis("delta", len(experts), lambda name: [row.mul_(factor) for row in cleaned(name)])


def factor_of(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    order: Sequence[str],
    alpha: float,
    matrices: Literal["all", "blocks"],
    conv: Literal["others", "reshape"],
    fused: Literal["split", "whole"],
) -> float:
    """The factor by which OPCM scales the sum of the cleaned task vectors.

    Arguments are those of :func:`prepare`.
    """
    return _cleaned_and_factor(base, experts, order, alpha, matrices, conv, fused)[1]


def _cleaned_and_factor(
    base: TensorSource,
    experts: Sequence[TensorSource],
    order: Sequence[str],
    alpha: float,
    matrices: Literal["all", "blocks"],
    conv: Literal["others", "reshape"],
    fused: Literal["split", "whole"],
) -> tuple[Callable[[str], list[torch.Tensor]], float]:
    """Tensor name -> cleaned task vectors, and the factor of their sum."""
    joining = joining_order("opcm", order, experts)
    selection = Selection.of(base, matrices=matrices, conv=conv, fused=fused, others="sum")

    def formula(part: MatrixPart, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        return _cleaned(base, experts, part, deltas, joining, alpha)

    cleaned = rows_by_matrix(base, experts, selection, formula)
    factor = _factor(base, experts, cleaned, [joining, alpha, matrices, conv, fused])
    return cleaned, factor


def _cleaned(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    deltas: list[torch.Tensor],
    joining: Sequence[int],
    alpha: float,
) -> list[torch.Tensor]:
    """The task vectors of one matrix, each cleaned of what was merged before it."""
    first, *rest = joining

    def compute() -> dict[str, torch.Tensor]:
        import torch

        merged = deltas[first].to(torch.float64, copy=True)  # T
        vectors = {}
        for k in rest:
            known = deltas[k].dtype
            svd = decompose(merged, None, part.draws(), place_of(base), known)
            vector = clean(deltas[k].double(), svd, alpha, known)  # τ'
            merged += vector
            vectors[str(k)] = vector.to(deltas[k].dtype)
        return vectors

    # Decompositions take nearly all the time, and both passes over the model need them.
    key = ["task vectors cleaned one after another", *part.key, joining, alpha]
    vectors = remembered([base, *experts], key, compute) if rest else {}
    return [vectors.get(str(k), delta).to(delta.device) for k, delta in enumerate(deltas)]


def clean(vector: torch.Tensor, merged: Svd, alpha: float, dtype: torch.dtype) -> torch.Tensor:
    """``τ' = U X Vᵀ``, where X is ``Uᵀ τ V`` without its diagonal and its upper left block.

    Args:
        vector: τ, ``(m, n)``.
        merged: Decomposition of T.
        alpha: Share of the singular values that the block covers.
        dtype: Of the weights, which bounds what is known of small singular values.
    """
    import torch

    rank = numerical_rank(merged.values, vector.shape, dtype)
    kept = merged.top(rank)
    # r: σ_1 + ... + σ_r ≤ α Σ_i σ_i
    shares = kept.values.cumsum(0) <= alpha * kept.values.sum()
    block = rank if alpha == 1 else int(shares.sum())
    # X = Uᵀ τ V; removed are its diagonal and X[:r, :r]
    projected = kept.left.T @ vector @ kept.right.T
    removed = torch.diag(projected.diagonal())
    removed[:block, :block] = projected[:block, :block]
    return vector - kept.left @ removed @ kept.right


def _factor(
    base: TensorSource,
    experts: Sequence[TensorSource],
    cleaned: Callable[[str], list[torch.Tensor]],
    key: list[Any],
) -> float:
    """Mean of the ``‖τ_k‖`` over the norm of ``Σ_k τ'_k``, all of the whole model."""

    def compute() -> dict[str, torch.Tensor]:
        import torch

        squares = [0.0] * len(experts)
        total = 0.0
        for name in base.names:
            vectors = task_vectors(base, experts, name)
            squares = [
                square + dot(vector, vector)
                for square, vector in zip(squares, vectors, strict=True)
            ]
            merged = torch.stack(cleaned(name)).sum(0)
            total += dot(merged, merged)
        mean = sum(math.sqrt(square) for square in squares) / len(squares)
        # Task vectors that cancel out leave nothing to scale.
        return {
            "factor": torch.tensor(
                mean / math.sqrt(total) if total > 0 else 1.0, dtype=torch.float64
            )
        }

    return float(
        remembered([base, *experts], ["norm of cleaned task vectors", *key], compute)["factor"]
    )


OPCM = Operator(
    name="opcm",
    prepare=prepare,
    summary="experts join one after another, each cleaned of what overlaps with the merge so far",
    paper="Tang 2025, Merging models on the fly without retraining",
    family="spectral",
    scope="G",
    identities=frozenset({"base_at_zero", "single_expert", "linearity", "homogeneity"}),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 2.0),
    refuse=refuse_order,
    # Task vectors, cleaned ones, rows; in fp64 the merge so far, its decomposition and work space.
    copies=lambda experts: 3 * experts + 18,
    order_sensitive=True,
    when="for experts that arrive one at a time, where earlier ones must not be forgotten",
)
