"""Model Breadcrumbs: leave out the largest changes and the small ones, keep what lies between.

Davari 2024, "Model Breadcrumbs: scaling multi-task model merging with sparse masks". Of the n
magnitudes of a row, in descending order, those of the ranks (γn, (γ + β)n] are kept; β is called
``density`` here. As in the authors' code rows run along the last dimension; tools that rank a whole
tensor are reproduced by ``scope="tensor"``. Defaults follow the authors' example. ``elect`` adds
the election of TIES ("breadcrumbs_ties" elsewhere).

Numbers of elements are ⌊γn⌋ left out and ⌈βn⌉ kept: a small tensor loses no outlier rather than all
it has. Equal magnitudes are ranked by position. Unlike in the authors' code, norms, biases and
scalars are left whole unless asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.kernels.host import host_fp32
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.election import (
    SHARED_IDENTITIES,
    Fractional,
    elected_basis,
    is_exempt,
    merging_of,
)
from mergesearch.merging.operators.parts.magnitudes import (
    count_kept,
    largest_mask,
    magnitude_histogram,
)
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.operators.parts.election import Vectors

#: Elements sorted at a time, in whole rows.
BLOCK = 1 << 22


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    density: Annotated[
        Fractional, Field(description="fraction of elements kept, below the outliers")
    ] = 0.2,
    gamma: Annotated[
        float, Field(ge=0, lt=1, description="fraction of elements left out as outliers")
    ] = 0.1,
    scope: Annotated[
        Literal["row", "tensor"], Field(description="among which elements magnitudes are ranked")
    ] = "row",
    elect: Annotated[bool, Field(description="elect a sign at every position, as in TIES")] = False,
    vectors: Annotated[
        Literal["pass", "trim"], Field(description="whether 1-D tensors are thinned")
    ] = "pass",
) -> Basis:
    """Task vectors without their largest and without their small elements."""
    thin = middling(base, experts, density, gamma, scope, vectors)
    if elect:
        return elected_basis(
            base, experts, thin, "mean", "frozen", ["breadcrumbs", density, gamma, scope, vectors]
        )
    return Basis("delta", len(experts), thin, direct=merging_of(thin))


def middling(
    base: TensorSource,
    experts: Sequence[TensorSource],
    density: float,
    gamma: float,
    scope: str,
    vectors: str,
) -> Vectors:
    """Tensor name -> task vectors with only the magnitudes between outliers and noise."""

    def thin(name: str) -> list[torch.Tensor]:
        task = finite_task_vectors(base, experts, name)
        if is_exempt(base.shape(name), vectors):
            return task
        return [keep_between(vector, density, gamma, scope) for vector in task]

    return thin


def keep_between(vector: torch.Tensor, density: float, gamma: float, scope: str) -> torch.Tensor:
    """``vector``, overwritten with 0 outside the ranks ``⌊γn⌋ + 1`` to ``⌊γn⌋ + ⌈βn⌉``.

    Magnitudes are ranked within rows, or within the whole tensor, in descending order.
    """
    if vector.numel() == 0:
        return vector
    if scope == "tensor":
        outliers, last = _ranks(vector.numel(), density, gamma)
        counts = magnitude_histogram(lambda: [("tensor", vector)])
        dropped = largest_mask(vector, outliers, counts)
        dropped |= ~largest_mask(vector, last, counts)
        return vector.masked_fill_(dropped, 0.0)
    vector = vector.contiguous()
    rows = vector.view(-1, vector.shape[-1])
    outliers, last = _ranks(rows.shape[1], density, gamma)
    numbers = host_fp32(vector)
    if numbers is not None:
        from mergesearch.merging.kernels.chunks.ranking import keep_ranks

        keep_ranks(numbers, rows.shape[1], outliers, last)
        return vector
    height = max(1, BLOCK // rows.shape[1])
    for start in range(0, rows.shape[0], height):
        block = rows[start : start + height]
        order = block.abs().argsort(dim=1, descending=True, stable=True)
        block.scatter_(1, order[:, :outliers], 0.0).scatter_(1, order[:, last:], 0.0)
    return vector


def _ranks(total: int, density: float, gamma: float) -> tuple[int, int]:
    """``⌊γn⌋`` and ``⌊γn⌋ + ⌈βn⌉``: number of outliers, and the last rank that is kept."""
    outliers = math.floor(Fraction(repr(float(gamma))) * total)
    return outliers, min(total, outliers + count_kept(density, total))


def _refuse_range(_layout: Layout, _experts: int, options: Options) -> str | None:
    """Why outliers and kept elements do not fit a row, or None."""
    density = options["density"]
    gamma = options["gamma"]
    if Fraction(repr(float(density))) + Fraction(repr(float(gamma))) > 1:
        return (
            f"expected density + gamma <= 1, received density {density} and gamma {gamma}; density "
            "counts fractions of all elements, not of those that the outliers leave"
        )
    return None


BREADCRUMBS = Operator(
    name="breadcrumbs",
    prepare=prepare,
    summary="leave out the largest changes and the small ones, add up what lies between",
    paper="Davari 2024, Model Breadcrumbs: scaling multi-task model merging with sparse masks",
    family="sparse",
    scope="G",
    identities=SHARED_IDENTITIES,
    default=lambda _experts, options: 1.0 if options["elect"] else 0.4,
    bounds=lambda _experts, options: (0.0, 1.6) if options["elect"] else (0.0, 1.0),
    plain={"density": 1.0, "gamma": 0.0},
    plain_identities=SHARED_IDENTITIES | {"single_expert", "expert_near_one_hot"},
    refuse=_refuse_range,
    copies=lambda experts: experts + 8,
    row_form=lambda _options: "masked",
    density=lambda options: float(options["density"]),
    when="for many experts with a few outlying changes; with `elect` where their signs disagree",
)
