"""Orders in which experts join a merge, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.source import Options, TensorSource

Order = Annotated[
    list[str], Field(description="names of all experts, in the order in which they join")
]


def joining_order(
    operator: str, order: Sequence[str], experts: Sequence[TensorSource]
) -> list[int]:
    """Indices of the experts, in the order in which they join.

    Args:
        operator: Its name, for the message.
        order: Names in the order in which they join.
        experts: The experts.

    Raises:
        RecipeError: If ``order`` does not hold the name of every expert once.
    """
    names = [expert.name for expert in experts]
    if sorted(order) != sorted(names):
        raise RecipeError(
            f"operator {operator}: order: expected every expert once, of {names}, received {order}"
        )
    return [names.index(name) for name in order]


def refuse_order(_layout: Layout, experts: int, options: Options) -> str | None:
    """Why ``order`` cannot be that of so many experts, or None."""
    order = options["order"]
    if len(order) == experts == len(set(order)):
        return None
    return f"order: expected the names of {experts} experts, each once, received {order}"
