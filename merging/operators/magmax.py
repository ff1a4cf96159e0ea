"""MagMax: at every position the change of the largest magnitude, whatever its sign.

Marczak 2024, "MagMax: leveraging model merging for seamless continual learning": τ^p = τ_k^p for
the expert k with the largest |τ_k^p| at position p, and merged = base + λ τ. The paper's experts
are trained one after the other, each from the one before; task vectors are differences to the
common base all the same. Experts that were trained apart work, too, and cancel each other more.

The selected vector has one coefficient per expert, over the positions where that expert is the
largest. Equal magnitudes are shared, so that the order of the experts does not matter; the authors'
code takes the last of them. λ = 0.5 is theirs for eight experts that were trained apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch


def prepare(base: TensorSource, experts: Sequence[TensorSource]) -> Basis:
    """Every task vector where it has the largest magnitude of all, 0 elsewhere."""
    return Basis(
        "delta", len(experts), lambda name: _largest(finite_task_vectors(base, experts, name))
    )


def _largest(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The vectors, each kept where it has the largest magnitude; they are overwritten."""
    import torch

    largest = vectors[0].abs()
    for vector in vectors[1:]:
        torch.maximum(largest, vector.abs(), out=largest)
    count = torch.zeros_like(largest)
    for vector in vectors:
        count += vector.abs() == largest
    # τ^p = τ_k^p, k = argmax_i |τ_i^p|, shared among equals
    return [vector.masked_fill_(vector.abs() != largest, 0.0).div_(count) for vector in vectors]


MAGMAX = Operator(
    name="magmax",
    prepare=prepare,
    summary="the change of the largest magnitude at every position",
    paper="Marczak 2024, MagMax: leveraging model merging for seamless continual learning",
    family="sparse",
    scope="E",
    identities=frozenset(
        {
            "base_at_zero",
            "single_expert",
            "permutation",
            "linearity",
            "homogeneity",
            "zero_vector",
            "default_ignores_zero_vector",
        }
    ),
    default=lambda _experts, _options: 0.5,
    bounds=lambda _experts, _options: (0.0, 1.5),
    copies=lambda experts: 2 * experts + 6,
    row_form=lambda _options: "masked",
    when="for experts that were trained one after the other, each from the one before",
)
