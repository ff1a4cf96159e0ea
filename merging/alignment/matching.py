"""Units of an expert are assigned to units of the base by coordinate descent over groups.

Ainsworth et al., "Git Re-Basin" (ICLR 2023), algorithm 1: with all other groups in place, the best
order of one group is a linear assignment, whose gains are inner products of what belongs to a unit
of the base and to one of the expert, summed over all tensors that the group acts on. Heads are
assigned with their channels: the gain of a pair of heads is that of the best order of channels
within it, so that a permutation inside an expert's head does not hide that it is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mergesearch.merging.alignment.groups import Groups, Leaf, Leaves
from mergesearch.merging.alignment.moving import (
    Indices,
    Moves,
    axis_index,
    identity,
    moved,
    ordered,
)

#: Sweeps over all groups, at most.
SWEEPS = 100
#: Gains below this share of the objective end the descent.
LEAST_GAIN = 1e-9
Gains = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Term:
    """What is compared: a tensor of the base and its like of the expert.

    Attributes:
        read: Reads both in single precision or wider.
        axes: The leaves of their dimensions.
    """

    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    axes: Leaves

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(leaf.size for axis in self.axes for leaf in axis)

    def places(self, group: int) -> list[int]:
        """Dimensions that a group acts on."""
        return [p for p, axis in enumerate(self.axes) if any(leaf.group == group for leaf in axis)]


def match(groups: Groups, terms: Sequence[Term], seed: int = 0, sweeps: int = SWEEPS) -> Moves:
    """The orders of all groups that make base and expert agree most, as far as descent finds them.

    Args:
        groups: Of the model.
        terms: What is compared.
        seed: Of the order in which groups take turns.
        sweeps: Over all groups, at most.
    """
    starts = [identity(groups), _anchored(groups, terms)]
    found = [_descended(groups, terms, start, seed, sweeps) for start in starts]
    return Moves(max(found, key=lambda orders: agreement(groups, terms, orders)))


def _descended(
    groups: Groups, terms: Sequence[Term], orders: dict[int, Indices], seed: int, sweeps: int
) -> dict[int, Indices]:
    """Descent from a start: groups take turns in random order until nothing is gained."""
    rng = np.random.default_rng(seed)
    acting = {index: [t for t in terms if t.places(index)] for index in orders}
    turns = [index for index, found in acting.items() if found]
    for _ in range(sweeps):
        gained = [_improve(groups, acting[i], i, orders) for i in rng.permutation(turns).tolist()]
        if not any(gained):
            break
    return orders


def _anchored(groups: Groups, terms: Sequence[Term]) -> dict[int, Indices]:
    """A start in which every group is assigned by tensors whose other axes are settled already.

    Inputs and answers are settled from the beginning, so it goes inwards from there; the group of
    which most is known comes next. The paper starts with all units in place instead, which says
    nothing of a group until its neighbours are settled.
    """
    orders = identity(groups)
    open_groups = {index for index in orders if any(term.places(index) for term in terms)}
    while open_groups:
        known = {index: _settled(groups, terms, index, open_groups) for index in open_groups}
        chosen = max(sorted(open_groups), key=lambda index: sum(t.size for t in known[index]))
        own = known[chosen] or [term for term in terms if term.places(chosen)]
        orders |= _assigned(groups, own, chosen, groups.children(chosen), orders)
        open_groups -= {chosen, *groups.children(chosen)}
    return orders


def _settled(
    groups: Groups, terms: Sequence[Term], index: int, open_groups: Collection[int]
) -> list[Term]:
    """Terms that a group acts on in which no other group but those within it is open."""
    own = {index, *(i for i, group in enumerate(groups.groups) if index in group.outer)}
    return [
        term
        for term in terms
        if term.places(index)
        and not any(
            leaf.group in open_groups and leaf.group not in own
            for axis in term.axes
            for leaf in axis
        )
        and len(term.places(index)) == 1
    ]


def _improve(
    groups: Groups, terms: Sequence[Term], index: int, orders: dict[int, Indices]
) -> float:
    """Give a group, and the groups within it, their best orders; what was gained."""
    before = agreement(groups, terms, orders)
    new = _assigned(groups, terms, index, groups.children(index), orders)
    after = agreement(groups, terms, {**orders, **new})
    if after <= before + LEAST_GAIN * abs(before):
        return 0.0
    orders.update(new)
    return after - before


def agreement(groups: Groups, terms: Iterable[Term], orders: Mapping[int, Indices]) -> float:
    """Inner product of the base with the expert in its coordinates, over all terms."""
    total = 0.0
    for term in terms:
        base, expert = term.read()
        found = moved(expert, term.axes, groups, Moves(orders))
        total += float((base.double() * found.double()).sum())
    return total


def _assigned(
    groups: Groups,
    terms: Sequence[Term],
    index: int,
    children: Sequence[int],
    orders: Mapping[int, Indices],
) -> dict[int, Indices]:
    group = groups.groups[index]
    outer = int(np.prod(groups.outer_sizes(index), dtype=int))
    plain = np.zeros((outer, group.size, group.size))
    within = {
        child: np.zeros((group.size, group.size, *[groups.groups[child].size] * 2))
        for child in children
    }
    for term in terms:
        base, expert = term.read()
        for place in term.places(index):
            child = _first_of(within, term.axes[place])
            ours, theirs = facing(groups, term, place, index, child, orders, base, expert)
            if child is None:
                plain += _gains(ours, theirs)
            else:
                within[child] += _pair_gains(ours, theirs)
    pairs = {child: _best_within(gains) for child, gains in within.items()}
    total = plain[0] + sum(value for value, _ in pairs.values()) if pairs else None
    if total is None:
        order = np.stack([assigned(gains) for gains in plain])
        return {index: order.reshape(*groups.outer_sizes(index), group.size)}
    chosen = assigned(total)
    rows = np.arange(group.size)
    return {index: chosen, **{child: inner[rows, chosen] for child, (_, inner) in pairs.items()}}


def _first_of(groups: Collection[int], axis: tuple[Leaf, ...]) -> int | None:
    """The outermost of some groups in a dimension."""
    return next((leaf.group for leaf in axis if leaf.group in groups), None)


def facing(
    groups: Groups,
    term: Term,
    place: int,
    index: int,
    child: int | None,
    orders: Mapping[int, Indices],
    base: torch.Tensor,
    expert: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors with the units of a group first, everything else in the base's places.

    Returns:
        Each ``(outer, size, rest)``, or ``(size, units of the child, rest)``.
    """
    for other, axis in enumerate(term.axes):
        if other != place:
            expert = ordered(expert, other, axis, groups, orders)
    axis = term.axes[place]
    inner = {i for i, each in enumerate(groups.groups) if index in each.outer}
    skipped = {index, *inner}
    expert = ordered(expert, place, axis, groups, orders, skipped)
    if child is None:
        # What lies within a unit is in an order that belongs to the base's unit, so it is undone
        # there.
        back = axis_index(axis, groups, {i: orders[i] for i in inner if i in orders})
        if back is not None:
            base = base.index_select(place, torch.from_numpy(np.argsort(back)))
    front = [*groups.groups[index].outer, index] if child is None else [index, child]
    return _to_front(base, place, axis, front), _to_front(expert, place, axis, front)


def _to_front(
    tensor: torch.Tensor, place: int, axis: tuple[Leaf, ...], front: Sequence[int]
) -> torch.Tensor:
    """A tensor with some leaves of a dimension first, ``(..., size of the last, rest)``."""
    last = tensor.movedim(place, 0)
    split = last.reshape(*(leaf.size for leaf in axis), -1)
    groups = [leaf.group for leaf in axis]
    places = [groups.index(group) for group in front]
    moved_first = split.movedim(places, [*range(len(places))])
    sizes = [axis[at].size for at in places]
    return moved_first.reshape(int(np.prod(sizes[:-1], dtype=int)), sizes[-1], -1).double()


def _gains(ours: torch.Tensor, theirs: torch.Tensor) -> Gains:
    """Inner products of units, ``(outer, size, size)``."""
    return np.asarray(ours @ theirs.transpose(1, 2))


def _pair_gains(ours: torch.Tensor, theirs: torch.Tensor) -> Gains:
    """Inner products of channels of every pair of heads, ``(heads, heads, size, size)``."""
    heads, size, _ = ours.shape
    gains = ours.reshape(heads * size, -1) @ theirs.reshape(heads * size, -1).T
    return np.asarray(gains.reshape(heads, size, heads, size).permute(0, 2, 1, 3))


def _best_within(gains: Gains) -> tuple[Gains, Indices]:
    """Gain and order of channels of every pair of heads, ``(heads, heads)`` and with channels."""
    orders = np.array([[assigned(pair) for pair in row] for row in gains])
    picked = np.take_along_axis(gains, orders[..., None], axis=-1)[..., 0]
    return picked.sum(axis=-1), orders


def assigned(gains: Gains) -> Indices:
    """For each row the column that it is assigned to, so that the sum of gains is largest."""
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(gains, maximize=True)[1])
