"""Groups are tried on the model: those that change what it answers are fixed.

A trace says what should hold. Here the units of all groups are moved at random, and the answers
are compared; if they differ, each group is tried alone, first with an order for each unit that it
lies in, then with one for all, and is given up if neither holds. Rotations are found in no other
way: no trace tells a product from a nonlinearity, but answers do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mergesearch.merging.alignment.groups import Group, Groups, Leaf
from mergesearch.merging.alignment.moving import Indices, Moves

#: Largest difference of answers, as a share of their largest size.
TOLERANCE = 1e-4

#: Answers of the model with its units moved.
Answer = Callable[[Groups, Moves], list[torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Prober:
    """Tries groups on a model.

    Attributes:
        answer: Runs the model with moved units.
        expected: What it answers with all units in place.
        rng: Draws moves.
    """

    answer: Answer
    expected: Sequence[torch.Tensor]
    rng: np.random.Generator

    def holds(self, groups: Groups, indices: Sequence[int]) -> bool:
        """Whether answers stay when the units of these groups are moved at random."""
        orders = {}
        turns = {}
        for index in indices:
            group = groups.groups[index]
            sizes = groups.outer_sizes(index)
            if group.kind == "permutation":
                orders[index] = random_order(sizes, group.size, self.rng)
            else:
                turns[index] = _random_turn(group, sizes, self.rng)
        found = self.answer(groups, Moves(orders, turns))
        return all(map(same, self.expected, found))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two answers differ by rounding alone."""
    if not ours.is_floating_point():
        return True
    size = float(ours.abs().max()) if ours.numel() else 0.0
    return bool(float((ours - theirs).abs().max()) <= TOLERANCE * max(size, 1e-6)) if size else True


def proven(groups: Groups, prober: Prober) -> Groups:
    """The groups that the model allows, with what their units may be moved by."""
    if not prober.holds(groups, groups.order):
        groups = _one_by_one(groups, prober)
    return _with_rotations(groups, prober)


def _one_by_one(groups: Groups, prober: Prober) -> Groups:
    wrong = []
    for index in groups.order:
        if prober.holds(groups, [index]):
            continue
        alone = groups.changed(index, replace(groups.groups[index], outer=()))
        if groups.groups[index].outer and prober.holds(alone, [index]):
            groups = alone
        else:
            wrong.append(index)
    return groups.without(wrong)


def _with_rotations(groups: Groups, prober: Prober) -> Groups:
    """Channels of heads that may be rotated: freely, or in pairs under rotary positions."""
    groups, rotary = _rotary_candidates(groups)
    inner = [index for index in groups.order if groups.groups[index].outer and index not in rotary]
    turned = groups
    for index in inner:
        turned = _rotated(turned, index)
    held = _that_hold(turned, inner, prober)
    for index in held:
        groups = _rotated(groups, index)
    lost = {*rotary} - {*_that_hold(groups, rotary, prober)}
    return groups.without(sorted(lost))


def _that_hold(groups: Groups, indices: Sequence[int], prober: Prober) -> Sequence[int]:
    """Those of some groups by which answers stay: tried together, then each alone."""
    if not indices or prober.holds(groups, indices):
        return indices
    return [index for index in indices if prober.holds(groups, [index])]


def _rotated(groups: Groups, index: int) -> Groups:
    return groups.changed(index, replace(groups.groups[index], kind="rotation"))


def _rotary_candidates(groups: Groups) -> tuple[Groups, list[int]]:
    """Fixed channels of heads as groups of their own, one for each group of heads."""
    found: dict[tuple[int, int], int] = {}
    more: list[Group] = []
    tensors = dict(groups.tensors)
    heads = {outer for group in groups.groups for outer in group.outer}
    for name, axes in groups.tensors.items():
        changed = list(axes)
        for place, axis in enumerate(axes):
            first = next((leaf.group for leaf in axis if leaf.group in heads), None)
            last = axis[-1] if len(axis) > 1 else Leaf(1, 0)
            if first is None or last.group is not None or last.size % 2:
                continue
            index = found.setdefault((first, last.size), len(groups.groups) + len(more))
            if index == len(groups.groups) + len(more):
                more.append(Group(last.size, (first,), "rotary"))
            changed[place] = (*axis[:-1], Leaf(last.size, index))
        tensors[name] = tuple(changed)
    return replace(groups, groups=(*groups.groups, *more), tensors=tensors), [*found.values()]


def random_order(outer: Sequence[int], size: int, rng: np.random.Generator) -> Indices:
    """A random order for each outer unit, ``(*outer, size)``."""
    return np.asarray(rng.permuted(np.broadcast_to(np.arange(size), (*outer, size)), axis=-1))


def _random_turn(group: Group, outer: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
    if group.kind == "rotary":
        return rotary_turn(torch.from_numpy(rng.uniform(0, 2 * np.pi, (*outer, group.size // 2))))
    normal = rng.standard_normal((*outer, group.size, group.size))
    return torch.from_numpy(np.linalg.qr(normal)[0])


def rotary_turn(angles: torch.Tensor) -> torch.Tensor:
    """Matrices that turn channels ``i`` and ``i + n`` by an angle.

    Args:
        angles: ``(..., n)``.

    Returns:
        ``(..., 2n, 2n)``.
    """
    cosines = torch.diag_embed(angles.cos())
    sines = torch.diag_embed(angles.sin())
    rows = (torch.cat([cosines, -sines], -1), torch.cat([sines, cosines], -1))
    return torch.cat(rows, -2)
