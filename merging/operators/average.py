"""Weight averaging, or "model soup".

Wortsman 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time". Here the base is one more ingredient, merged = (1 − Σ_k c_k)
base + Σ_k c_k expert_k: uniform coefficients 1/K leave the base out, and every expert is reached
bit for bit, which base + difference cannot promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.merging.operators.base import Basis, Direct, Operator
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch


def prepare(base: TensorSource, experts: Sequence[TensorSource]) -> Basis:
    """The experts themselves, as rows of an interpolation."""

    def rows(name: str) -> list[torch.Tensor]:
        import torch

        like = base.read(name)
        tensors = [expert.read(name).to(like.device) for expert in experts]
        return [
            tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
            for tensor in tensors
        ]

    def direct(
        _name: str, numbers: Sequence[Any], weights: Any, boundaries: Any, out: Any, _later: bool
    ) -> Direct:
        from mergesearch.merging.kernels.source_numba import merge_sources

        return Direct(*merge_sources(numbers, weights, boundaries, False, out))

    # θ = (1 − Σ_k c_k) θ_0 + Σ_k c_k θ_k
    return Basis("interpolation", len(experts), rows, direct=direct)


AVERAGE = Operator(
    name="average",
    prepare=prepare,
    summary="weighted average of the experts, with the remainder up to 1 on the base",
    paper="Wortsman 2022, Model soups",
    family="linear",
    scope="E",
    identities=frozenset(
        {
            "base_at_zero",
            "expert_at_one_hot",
            "expert_near_one_hot",
            "single_expert",
            "identical_experts",
            "permutation",
            "linearity",
            "homogeneity",
            "zero_vector",
        }
    ),
    default=lambda experts, _options: 1.0 / experts,
    bounds=lambda _experts, _options: (0.0, 1.0),
    copies=lambda experts: experts + 2,
    row_form=lambda _options: "stored",
    when="for fine-tunings of one task, and as the baseline that needs no choice",
)
