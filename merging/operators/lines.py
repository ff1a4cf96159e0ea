"""LiNeS: task vectors scaled linearly with depth.

Wang 2025, "LiNeS: post-training layer scaling prevents forgetting and enhances model merging": a
tensor of block l of L is scaled by α + β · l / (L − 1), a tensor outside the blocks by α (the final
norm and the head as well).

α = 1/K is the paper's ‖Σ τ_k‖₁ / ‖τ_MTL‖₁ · 1/K for the merge of task arithmetic, τ_MTL = Σ τ_k.
Blocks are those of :mod:`mergesearch.merging.tensors.roles`, each tower with its own depth; the
authors' search for ".3." anywhere in a name mistakes the number of an expert or of a Sequential
entry for a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.roles import block_axes, depth_in, roles_of
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    alpha: Annotated[
        Annotated[float, Field(ge=0)] | None,
        Field(description="scale of the first block; None for 1/K"),
    ] = None,
    beta: Annotated[
        float, Field(ge=0, description="scale of the last block less that of the first")
    ] = 0.3,
) -> Basis:
    """The task vectors times the scale of their depth."""
    scales = depth_scales(base.names, len(experts), alpha, beta)

    def rows(name: str) -> list[torch.Tensor]:
        return [delta.mul_(scales[name]) for delta in task_vectors(base, experts, name)]

    return Basis("delta", len(experts), rows)


def depth_scales(
    names: Iterable[str], experts: int, alpha: float | None, beta: float
) -> dict[str, float]:
    """Tensor -> α + β · l / (L − 1), and α outside the blocks."""
    first = 1.0 / experts if alpha is None else alpha  # α
    roles = roles_of(names)
    axes = block_axes(roles.values())
    return {name: first + beta * (depth_in(role, axes) or 0.0) for name, role in roles.items()}


LINES = Operator(
    name="lines",
    prepare=prepare,
    summary="task arithmetic with a scale that grows linearly with depth",
    paper="Wang 2025, LiNeS: post-training layer scaling prevents forgetting and enhances model "
    "merging",
    family="linear",
    scope="E",
    identities=frozenset({"base_at_zero", "permutation", "linearity", "homogeneity"}),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    plain={"alpha": 1.0, "beta": 0.0},
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
    copies=lambda experts: experts + 2,
    row_form=lambda _options: "stored",
    when="where early layers should stay general: against forgetting what the base could",
)
