"""Localize-and-Stitch without data: small regions of every expert, averaged where they overlap.

He 2024, "Localize-and-Stitch: efficient model merging via sparse task arithmetic", in two steps:

1. Localize: the mask γ_k of expert k holds the ``density`` of its elements with the largest |τ_k|.
   This is the paper's variant for experts without data; with data it learns γ_k from there.
2. Stitch: merged = base + Σ_k γ'_k ⊙ τ_k, where γ'_k = γ_k / Σ_j γ_j.

There is no scale to tune: each region gets its expert's own weights, so that coefficient 1 is the
published merge. As in :mod:`mergesearch.merging.operators.ties` one threshold holds for the whole
model, r = ceil(density · n) elements are kept with the ties of the last one, and an element that an
expert did not change belongs to no region of it. The authors leave embeddings and final norms of
some models out; coefficients of 0 for their group do so here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators import ties
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.election import SHARED_IDENTITIES, Fractional
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    import torch


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    density: Annotated[
        Fractional, Field(description="fraction of elements that the region of an expert holds")
    ] = 0.1,
    scope: Annotated[
        ties.TrimScope,
        Field(
            description="among which elements magnitudes are ranked; module: attention, mlp, norm, "
            "..."
        ),
    ] = "model",
    vectors: Annotated[
        Literal["trim", "pass"],
        Field(description="whether 1-D tensors are localized, or lie in every region"),
    ] = "trim",
) -> Basis:
    """The regions of every expert, each element shared by the experts that hold it."""
    limits = ties.trimming_limits(base, experts, density, scope, vectors)
    localized = ties.trimmed(base, experts, limits)
    return Basis("delta", len(experts), lambda name: stitched(localized(name)))


def stitched(regions: list[torch.Tensor]) -> list[torch.Tensor]:
    """Step 2: ``γ'_k ⊙ τ_k`` from ``γ_k ⊙ τ_k``, which are overwritten."""
    import torch

    holders = torch.zeros_like(regions[0])
    for region in regions:
        holders += region != 0
    # γ'_k = γ_k / Σ_j γ_j
    holders.clamp_(min=1)
    return [region.div_(holders) for region in regions]


LOCALIZE_AND_STITCH = Operator(
    name="localize_and_stitch",
    prepare=prepare,
    summary="the largest changes of every expert, averaged where experts share them",
    paper="He 2024, Localize-and-Stitch: efficient model merging via sparse task arithmetic",
    family="sparse",
    scope="G",
    identities=SHARED_IDENTITIES,
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.6),
    plain={"density": 1.0},
    plain_identities=SHARED_IDENTITIES | {"single_expert", "identical_experts"},
    copies=lambda experts: experts + 6,
    row_form=lambda _options: "masked",
    density=lambda options: float(options["density"]),
    when="for many experts whose skills lie in few weights, and where nothing can be tuned",
)
