"""VaRM: experts averaged by how far each has moved, matrix by matrix.

Wan 2024, "FuseChat: knowledge fusion of chat models" (first version): weights in the ratio of the
mean squared change of the parameter matrix, w_k = E[τ_k²] / Σ_j E[τ_j²], merged = base + Σ w_k τ_k.
The authors' code falls back to equal weights as soon as one expert has not moved a matrix, which
gives an idle expert a say; here its weight is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.inner_products import dot
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch


def prepare(base: TensorSource, experts: Sequence[TensorSource]) -> Basis:
    """Task vectors times their share of the squared change of the tensor."""

    def rows(name: str) -> list[torch.Tensor]:
        vectors = task_vectors(base, experts, name)
        # w_k = E[τ_k²] / Σ_j E[τ_j²]; the number of elements cancels
        shares = shares_of([dot(vector, vector) for vector in vectors])
        return [vector * share for vector, share in zip(vectors, shares, strict=True)]

    return Basis("delta", len(experts), rows)


def shares_of(energies: Sequence[float]) -> list[float]:
    """Non-negative numbers over their sum; equal shares if all are 0."""
    total = sum(energies)
    return (
        [value / total for value in energies] if total > 0 else [1 / len(energies)] * len(energies)
    )


VARM = Operator(
    name="varm",
    prepare=prepare,
    summary="average weighted by the mean squared change of each matrix",
    paper="Wan 2024, FuseChat",
    family="linear",
    scope="T",
    identities=frozenset(
        {
            "base_at_zero",
            "single_expert",
            "identical_experts",
            "permutation",
            "linearity",
            "homogeneity",
            "zero_vector",
            "default_ignores_zero_vector",
        }
    ),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    copies=lambda experts: 2 * experts + 2,
    when="for chat models distilled into one shape, matrix by matrix",
)
