"""Tensors whose units are moved: reordered by permutations, turned by rotations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergesearch.merging.alignment.groups import Groups, Leaf, Leaves

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Moves:
    """Where the units of an expert go.

    Attributes:
        orders: Group -> for each unit of the base the unit of the expert that takes its place,
            ``(*outer, size)``.
        turns: Group -> matrix that is applied to the units once they are in order,
            ``(*outer, size, size)``.
        own: Stored name and dimension of a tensor -> matrix that is applied there instead of that
            of its group, which lies in no other ``(size, size)``.
    """

    orders: Mapping[int, Indices] = field(default_factory=dict)
    turns: Mapping[int, torch.Tensor] = field(default_factory=dict)
    own: Mapping[tuple[str, int], torch.Tensor] = field(default_factory=dict)


def identity(groups: Groups) -> dict[int, Indices]:
    """Orders that change nothing, of all groups whose units may be reordered."""
    return {index: unmoved(groups, index) for index in groups.order if groups.reorders(index)}


def unmoved(groups: Groups, index: int) -> Indices:
    """The order of a group that changes nothing, ``(*outer, size)``."""
    size = groups.groups[index].size
    return np.tile(np.arange(size), (*groups.outer_sizes(index), 1))


def moved(
    tensor: torch.Tensor, axes: Leaves, groups: Groups, moves: Moves, name: str = ""
) -> torch.Tensor:
    """A tensor of the expert with its units in the base's places, in its own dtype.

    Args:
        tensor: Of the expert.
        axes: Leaves of its dimensions.
        groups: Of the model.
        moves: Where units go.
        name: Its stored name, for moves that are its own.
    """
    for place, axis in enumerate(axes):
        tensor = ordered(tensor, place, axis, groups, moves.orders)
    for place, axis in enumerate(axes):
        own = moves.own.get((name, place))
        turns = moves.turns if own is None else {leaf.group: own for leaf in axis}
        tensor = _turned(tensor, place, axis, groups, turns)
    return tensor


def ordered(
    tensor: torch.Tensor,
    place: int,
    axis: tuple[Leaf, ...],
    groups: Groups,
    orders: Mapping[int, Indices],
    skipped: Collection[int] = (),
) -> torch.Tensor:
    """A tensor with the units of one dimension reordered, but for those of some groups."""
    index = axis_index(axis, groups, orders, skipped)
    return tensor if index is None else tensor.index_select(place, torch.from_numpy(index))


def axis_index(
    axis: tuple[Leaf, ...],
    groups: Groups,
    orders: Mapping[int, Indices],
    skipped: Collection[int] = (),
) -> Indices | None:
    """For each position of a dimension the position that it is taken from; None if all stay."""
    acting = {leaf.group for leaf in axis if leaf.group in orders} - {*skipped}
    if not acting:
        return None
    sizes = [leaf.size for leaf in axis]
    index = np.arange(int(np.prod(sizes))).reshape(sizes)
    # Outer units first: inner orders belong to places of the base.
    for place, leaf in enumerate(axis):
        if leaf.group is not None and leaf.group in acting:
            own = _laid_out(orders[leaf.group], place, axis, groups)
            index = np.take_along_axis(index, np.broadcast_to(own, sizes), place)
    return index.reshape(-1)


def _laid_out(order: Indices, place: int, axis: tuple[Leaf, ...], groups: Groups) -> Indices:
    """An order with its dimensions where they stand among the leaves of an axis."""
    group = axis[place].group
    assert group is not None
    outer = groups.groups[group].outer
    shape = [leaf.size if leaf.group in outer else 1 for leaf in axis[:place]]
    return order.reshape(*shape, axis[place].size, *([1] * (len(axis) - place - 1)))


def _turned(
    tensor: torch.Tensor,
    place: int,
    axis: tuple[Leaf, ...],
    groups: Groups,
    turns: Mapping[Any, torch.Tensor],
) -> torch.Tensor:
    """A tensor with the units of one dimension turned."""
    for at, leaf in enumerate(axis):
        if leaf.group is not None and leaf.group in turns:
            tensor = _turned_leaf(tensor, place, axis, at, groups, turns[leaf.group])
    return tensor


def _turned_leaf(
    tensor: torch.Tensor,
    place: int,
    axis: tuple[Leaf, ...],
    at: int,
    groups: Groups,
    turn: torch.Tensor,
) -> torch.Tensor:
    group = axis[at].group
    assert group is not None
    outer = groups.groups[group].outer
    sizes = [leaf.size for leaf in axis]
    shape = [leaf.size if leaf.group in outer else 1 for leaf in axis[:at]]
    size = sizes[at]
    full = turn.reshape(*shape, size, size).expand(*sizes[:at], size, size)
    last = tensor.movedim(place, -1)
    rows = last.reshape(-1, *sizes[:at], size, int(np.prod(sizes[at + 1 :])))
    product = (full.to(torch.float64) @ rows.to(torch.float64)).to(tensor.dtype)
    return product.reshape(last.shape).movedim(-1, place).contiguous()


def to_tensors(moves: Moves) -> dict[str, torch.Tensor]:
    """Moves as named tensors, for a file."""
    return {
        **{f"order.{index}": torch.from_numpy(order) for index, order in moves.orders.items()},
        **{f"turn.{index}": turn for index, turn in moves.turns.items()},
        **{f"own.{place}.{name}": turn for (name, place), turn in moves.own.items()},
    }


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> Moves:
    """Inverse of :func:`to_tensors`."""
    found: dict[str, dict[Any, Any]] = {"order": {}, "turn": {}, "own": {}}
    for key, tensor in tensors.items():
        what, _, rest = key.partition(".")
        index, _, name = rest.partition(".")
        found[what][(name, int(index)) if what == "own" else int(index)] = (
            tensor.numpy() if what == "order" else tensor
        )
    return Moves(found["order"], found["turn"], found["own"])
