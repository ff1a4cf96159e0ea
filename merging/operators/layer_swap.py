"""Layer swapping: the outer blocks of one expert around the middle blocks of another.

Bandarkar 2025, "Layer swapping for zero-shot cross-lingual transfer in large language models": the
``bottom`` first and ``top`` last blocks come from the first expert (of the language), the middle
from the second (of the task), and ``transition`` blocks on either side of the middle are the
average of both.

The result is one direction in the form of an interpolation, so that coefficient 1 gives the swapped
model bit for bit. Transitions weigh both experts equally, where the paper lets the weights be
chosen. Each tower of a model with several is swapped along its own depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.roles import TensorRole, block_axes, roles_of
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch

#: Where a tensor of the swapped model comes from: the first or the second expert, the average of
#: both, or the base.
SwapSource = Literal["first", "second", "both", "base"]
Count = Annotated[int, Field(ge=0)]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    bottom: Annotated[Count, Field(description="first blocks, taken from the first expert")],
    top: Annotated[Count, Field(description="last blocks, taken from the first expert")],
    transition: Annotated[
        Count, Field(description="averaged blocks on either side of the middle")
    ] = 0,
    outside: Annotated[
        Literal["first", "base", "second"],
        Field(description="where tensors outside the blocks come from"),
    ] = "first",
) -> Basis:
    """The swapped model, as the one row of an interpolation."""
    first, second = experts
    roles = roles_of(base.names)
    axes = block_axes(roles.values())

    def rows(name: str) -> list[torch.Tensor]:
        origin = swap_source(roles[name], axes, bottom, top, transition, outside)
        sources = {"first": [first], "second": [second], "both": [first, second], "base": [base]}[
            origin
        ]
        return [_mean([source.read(name).to(base.read(name).device) for source in sources])]

    return Basis("interpolation", 1, rows)


def swap_source(
    role: TensorRole,
    axes: Mapping[str, tuple[int, ...]],
    bottom: int,
    top: int,
    transition: int,
    outside: Literal["first", "base", "second"],
) -> SwapSource:
    """Where a tensor comes from.

    Args:
        role: Role of the tensor.
        axes: Tower -> numbers of its blocks, ascending.
        bottom: First blocks, from the first expert.
        top: Last blocks, from the first expert.
        transition: Averaged blocks on either side of the middle.
        outside: Where tensors outside the blocks come from.
    """
    if role.block is None:
        return outside
    axis = axes[role.tower]
    from_bottom = axis.index(role.block)
    # Blocks between this one and the nearer of the two outer parts; below 0 it lies inside one.
    inward = min(from_bottom - bottom, len(axis) - 1 - from_bottom - top)
    return "first" if inward < 0 else "both" if inward < transition else "second"


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    wide = (
        torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    )
    if len(tensors) == 1:
        return tensors[0].to(wide, copy=True)
    one, other = (tensor.to(wide) for tensor in tensors)
    return (one + other) / 2


def _refuse(layout: Layout, _experts: int, options: Options) -> str | None:
    axes = block_axes(roles_of(layout.names).values())
    if not axes:
        return (
            "expected tensors of numbered blocks (layers.0., h.0., ...), received none; use "
            "average instead"
        )
    asked = options["bottom"] + options["top"] + 2 * options["transition"]
    for tower, axis in axes.items():
        if asked > len(axis):
            where = f" of the {tower} tower" if tower else ""
            return (
                f"expected bottom + top + 2 · transition of at most {len(axis)}, the number of "
                f"blocks{where}, received {asked}; lower one of them"
            )
    return None


LAYER_SWAP = Operator(
    name="layer_swap",
    prepare=prepare,
    summary="outer blocks of the first expert around the middle blocks of the second",
    paper="Bandarkar 2025, Layer swapping for zero-shot cross-lingual transfer in large language "
    "models",
    family="linear",
    scope="E",
    identities=frozenset({"base_at_zero", "identical_experts", "linearity", "homogeneity"}),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.0),
    directions=lambda _experts, _options: 1,
    experts=(2, 2),
    refuse=_refuse,
    copies=lambda experts: experts + 3,
    order_sensitive=True,
    row_form=lambda _options: "stored",
    when="to give a task expert the language of another",
)
