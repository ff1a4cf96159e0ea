"""Permutation groups: which axes of which tensors may be reordered together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mergesearch.merging.alignment.axes import Axis, Dimension, leaves
from mergesearch.merging.alignment.tracing import Place, Trace

#: What a group may be moved by: permutations; any rotation (channels of heads that only products
#: read); rotations of pairs by one angle (channels under rotary positions).
Kind = Literal["permutation", "rotation", "rotary"]


@dataclass(frozen=True)
class Leaf:
    """An axis of units within a dimension.

    Attributes:
        size: Number of its units.
        group: Index of its group; None where the order is fixed.
    """

    size: int
    group: int | None


#: The leaves of every dimension of a tensor.
Leaves = tuple[tuple[Leaf, ...], ...]
#: Dimensions of a traced tensor -> their leaves.
ToLeaves = Callable[[Sequence[Dimension]], Leaves]


@dataclass(frozen=True)
class State:
    """A state of units that are added to, such as those of the residual stream.

    Attributes:
        axes: Leaves of the tensor that holds it.
        place: Operation whose result it is; None for a weight.
        weight: Stored name of the weight that it is; empty for a result.
        added: The states that it is the sum of; empty for one that a layer writes.
    """

    axes: Leaves
    place: Place | None
    weight: str = ""
    added: tuple[int, ...] = ()


@dataclass(frozen=True)
class Flow:
    """The states of one group of units, in the order of a forward pass.

    Attributes:
        states: All of them.
        uses: Stored name and dimension of a tensor -> the state that it writes or reads.
    """

    states: tuple[State, ...]
    uses: Mapping[tuple[str, int], int]


@dataclass(frozen=True)
class Group:
    """Units that are reordered together.

    Attributes:
        size: Number of units.
        outer: Groups within whose units these lie: each of their units has an order of its own.
        kind: What the units may be moved by.
    """

    size: int
    outer: tuple[int, ...] = ()
    kind: Kind = "permutation"


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of a model.

    Attributes:
        groups: By index.
        tensors: Stored name -> leaves of its dimensions.
        reads: Where activations are read in a forward pass -> leaves of their dimensions.
        odd: Operations whose operands were fixed because they have no rule.
        flows: Group -> its states, for groups whose units are added to.
        inputs: Stored name of a linear layer or a convolution -> its dimension of inputs.
    """

    groups: tuple[Group, ...]
    tensors: Mapping[str, Leaves]
    reads: Mapping[Place, Leaves]
    odd: frozenset[str] = frozenset()
    flows: Mapping[int, Flow] = field(default_factory=dict)
    inputs: Mapping[str, int] = field(default_factory=dict)

    def outer_sizes(self, index: int) -> tuple[int, ...]:
        """Sizes of the groups that a group lies in."""
        return tuple(self.groups[outer].size for outer in self.groups[index].outer)

    def reorders(self, index: int) -> bool:
        """Whether units of a group may be reordered."""
        return self.groups[index].kind != "rotary"

    def children(self, index: int) -> list[int]:
        """Groups with an order of their own for each unit of a group, and for no other."""
        return [i for i in self.order if self.groups[i].outer == (index,) and self.reorders(i)]

    def members(self, index: int) -> list[tuple[str, int]]:
        """Tensors and dimensions that a group acts on."""
        return [
            (name, place)
            for name, axes in self.tensors.items()
            for place, axis in enumerate(axes)
            if any(leaf.group == index for leaf in axis)
        ]

    @property
    def order(self) -> list[int]:
        """Indices of the groups that act on tensors, outer ones first."""
        used = {leaf.group for axes in self.tensors.values() for axis in axes for leaf in axis}
        found = [index for index in range(len(self.groups)) if index in used]
        return sorted(found, key=lambda index: len(self.groups[index].outer))

    def without(self, indices: Sequence[int]) -> Groups:
        """The same with some groups fixed."""
        return replace(
            self,
            groups=tuple(
                replace(group, outer=tuple(o for o in group.outer if o not in indices))
                for group in self.groups
            ),
            tensors={name: _fixed(axes, indices) for name, axes in self.tensors.items()},
            reads={place: _fixed(axes, indices) for place, axes in self.reads.items()},
            flows={index: flow for index, flow in self.flows.items() if index not in indices},
        )

    def changed(self, index: int, group: Group) -> Groups:
        """The same with another group of an index."""
        groups = list(self.groups)
        groups[index] = group
        return replace(self, groups=tuple(groups))


def groups_of(traced: Trace, stored: Mapping[str, str]) -> tuple[Groups, ToLeaves]:
    """The groups that a forward pass allows, and what gives the leaves of its tensors.

    They are candidates: :func:`mergesearch.merging.alignment.probing.proven` tries them.

    Args:
        traced: Of the model.
        stored: Stored name -> name in the model, for tensors that are whole parameters.
    """
    used = {*stored.values()}
    pinned = {
        axis
        for name, dims in traced.weights.items()
        if name not in used
        for dim in dims
        for axis in leaves(dim)
    }
    indices: dict[Axis, int] = {}

    def leaf(axis: Axis) -> Leaf:
        if axis.fixed or axis in pinned or axis.size == 1:
            return Leaf(axis.size, None)
        return Leaf(axis.size, indices.setdefault(axis, len(indices)))

    def axes(dims: Sequence[Dimension]) -> Leaves:
        return tuple(tuple(leaf(axis) for axis in leaves(dim)) for dim in dims)

    tensors = {
        name: axes(traced.weights[own]) for name, own in stored.items() if own in traced.weights
    }
    reads = {place: axes(dims) for place, dims in traced.reads.items()}
    acting = {each.group for dims in tensors.values() for dim in dims for each in dim} - {None}
    reads = {place: found for place, found in reads.items() if acting & _in(found)}
    groups = tuple(Group(axis.size) for axis in indices)
    plain = Groups(groups, tensors, reads, traced.odd)
    nested = tuple(replace(group, outer=_outer(plain, i)) for i, group in enumerate(groups))
    return replace(plain, groups=nested), axes


def _outer(groups: Groups, index: int) -> tuple[int, ...]:
    """Groups that stand before a group wherever it acts, outermost first."""
    before: list[list[int]] = []
    for name, place in groups.members(index):
        axis = [leaf.group for leaf in groups.tensors[name][place]]
        before.append([each for each in axis[: axis.index(index)] if each is not None])
    if not before:
        return ()
    return tuple(each for each in before[0] if all(each in other for other in before))


def _in(axes: Leaves) -> set[int | None]:
    return {leaf.group for axis in axes for leaf in axis}


def _fixed(axes: Leaves, indices: Sequence[int]) -> Leaves:
    return tuple(
        tuple(Leaf(leaf.size, None) if leaf.group in indices else leaf for leaf in axis)
        for axis in axes
    )
