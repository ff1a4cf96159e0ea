"""Task arithmetic: add task vectors to the base.

Ilharco 2023, "Editing models with task arithmetic": base + λ Σ (expert_k − base), here with one
coefficient per expert and segment. Differences are taken and kept in fp32; kept in bf16 they lose
1.7 % of the elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergesearch.merging.operators.base import Basis, Direct, Operator
from mergesearch.merging.operators.parts.task_vectors import task_factors, task_vectors
from mergesearch.merging.tensors.source import Options, TensorSource


def prepare(base: TensorSource, experts: Sequence[TensorSource]) -> Basis:
    """The task vectors ``expert − base``, as factors where every expert is an adapter."""
    # θ = θ_0 + Σ_k c_k τ_k
    return Basis(
        "delta",
        len(experts),
        lambda name: task_vectors(base, experts, name),
        factors=lambda name: task_factors(base, experts, name),
        direct=_merge_stored,
    )


def _merge_stored(
    _name: str, numbers: Sequence[Any], weights: Any, boundaries: Any, out: Any, _later: bool
) -> Direct:
    from mergesearch.merging.kernels.source_numba import merge_sources

    return Direct(*merge_sources(numbers, weights, boundaries, True, out))


def _bounds(experts: int, _options: Options) -> tuple[float, float]:
    # Few task vectors may be amplified; many add up, and coefficients near 1 leave the linear
    # regime.
    return (0.0, 1.0) if experts >= 4 else (0.0, 1.5)


TASK_ARITHMETIC = Operator(
    name="task_arithmetic",
    prepare=prepare,
    summary="the base plus a weighted sum of task vectors",
    paper="Ilharco 2023, Editing models with task arithmetic",
    family="linear",
    scope="E",
    identities=frozenset(
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
    default=lambda _experts, _options: 0.3,
    bounds=_bounds,
    copies=lambda experts: experts + 2,
    row_form=lambda _options: "stored",
    when="first: the space of plain task vectors, cheapest in memory and time",
)
