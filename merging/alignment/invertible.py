"""Heads whose channels may be mapped by any matrix that cancels, instead of turned.

Queries and keys are read by their product alone, and so are values and outputs: any invertible map
of the channels on one side, with its inverse transpose on the other, leaves the model's function as
it is (:mod:`mergesearch.merging.attention.head_maps`). Under rotary positions only rotations and
factors of pairs cancel. Wanted is the map under which both sides come nearest to the base's (eq. 1
of :mod:`mergesearch.merging.attention.fitted_maps`): the best of no map, a rotation (Schönemann
1966) and the fit of heads that were mapped on purpose, and then L-BFGS from there. A head of the
expert takes the place of the head of the base to which it comes nearest under its map.
Queries that share a key stay in their order, or in that of weight matching, whichever is nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from mergesearch.merging.alignment.groups import Groups
from mergesearch.merging.alignment.matching import assigned
from mergesearch.merging.alignment.moving import Moves, unmoved
from mergesearch.merging.attention.fitted_maps import Sides, fitted_map
from mergesearch.merging.attention.head_maps import SIDES, Freedom, Maps, Matrix, block_map
from mergesearch.merging.attention.heads import Attention
from mergesearch.merging.attention.realigning import KEPT, MappedHeads, mappable, sides_of
from mergesearch.merging.checkpoints.checkpoint import Checkpoint

#: Steps of L-BFGS, and the condition number of a map from which rounding would show in answers.
STEPS = 60
WORST = 1e3
#: Moves -> what reads a tensor of the expert that is moved so.
ReadMoved = Callable[[Moves], Callable[[str], torch.Tensor]]
Attentions = Sequence[tuple[Attention, tuple[Freedom, ...]]]


def attentions_of(base: Checkpoint) -> Attentions:
    """The attentions of a model whose heads may be mapped."""
    return mappable({name: shape for name, (shape, _) in base.merged.items()}, base.config)


def with_heads_assigned(
    groups: Groups, base: Checkpoint, read_moved: ReadMoved, moves: Moves
) -> Moves:
    """The moves with heads where they come nearest to the base's under maps of their own.

    Args:
        groups: Of the base.
        base: The base.
        read_moved: Reads the expert.
        moves: Found without maps.
    """
    for attention, free in attentions_of(base):
        index = _group_of(groups, attention, free)
        if index is None or moves.orders[index].ndim != 1:
            continue
        # Maps hide what weight matching found within a head.
        still = {child: unmoved(groups, child) for child in groups.children(index)}
        starts = (moves, replace(moves, orders={**moves.orders, **still}))
        tried = [
            _assigned(groups, base, read_moved, start, index, attention, free) for start in starts
        ]
        moves = min(tried, key=lambda each: each[0])[1]
    return moves


def _assigned(
    groups: Groups,
    base: Checkpoint,
    read_moved: ReadMoved,
    moves: Moves,
    index: int,
    attention: Attention,
    free: Sequence[Freedom],
) -> tuple[float, Moves]:
    """Distance of the heads of an attention to the base's, and the moves that lead there."""
    distances = _distances(base, read_moved(moves), attention, free)
    chosen = assigned(-distances)
    orders = dict(moves.orders)
    for each in (index, *groups.children(index)):
        if each in orders:
            orders[each] = orders[each][chosen]
    return float(distances[np.arange(len(chosen)), chosen].sum()), replace(moves, orders=orders)


def maps_of(
    base: Checkpoint, read: Callable[[str], torch.Tensor], attentions: Attentions
) -> MappedHeads:
    """The maps of all heads of an expert, found when they are asked for.

    Args:
        base: The base.
        read: Reads the expert, whose heads are in the base's places.
        attentions: Of the base.
    """

    @lru_cache(maxsize=KEPT)
    def maps(place: int) -> Maps:
        attention, free = attentions[place]
        return {
            one.pair: np.stack(
                [
                    descended(sides, one, begun(sides, one))
                    for sides in sides_of(base.read, read, attention, one.pair)
                ]
            )
            for one in free
        }

    return MappedHeads(attentions, maps)


def begun(sides: Sides, freedom: Freedom) -> Matrix:
    """The nearest of no map, a rotation and the fit of mapped heads, ``(width, width)``."""
    tried = [np.eye(len(sides.first)), rotation(sides, freedom), fitted_map(sides, freedom)]
    return min(tried, key=lambda act: sides.mapped(act).distance)


def rotation(sides: Sides, freedom: Freedom) -> Matrix:
    """The rotation under which both sides come nearest; of couples, one angle for each."""
    products = sides.first @ sides.own_first.T / _square(sides.first)
    products = products + sides.second @ sides.own_second.T / _square(sides.second)
    one = freedom.one
    other = freedom.other
    real = products[one, one] + products[other, other]
    imaginary = products[other, one] - products[one, other]
    angles = np.arctan2(imaginary, real)
    left, _, right = np.linalg.svd(products[np.ix_(freedom.rest, freedom.rest)])
    turned = np.stack((np.cos(angles), np.sin(angles)))
    return block_map(freedom, len(products), turned, left @ right)


def descended(sides: Sides, freedom: Freedom, start: Matrix) -> Matrix:
    """A map that brings both sides nearer than the one to start from, by L-BFGS on eq. 1."""
    one, other, rest = (torch.from_numpy(x) for x in (freedom.one, freedom.other, freedom.rest))
    first, second = (
        (torch.from_numpy(own @ own.T), torch.from_numpy(own @ ours.T), _square(ours))
        for ours, own in ((sides.first, sides.own_first), (sides.second, sides.own_second))
    )
    begin = torch.from_numpy(start)
    turned = torch.stack((begin[one, one], begin[other, one])).requires_grad_()
    mixed = begin[rest][:, rest].clone().requires_grad_()

    def act() -> torch.Tensor:
        made = torch.zeros_like(begin)
        made[one, one] = made[other, other] = turned[0]
        made[one, other] = -turned[1]
        made[other, one] = turned[1]
        made[rest[:, None], rest[None]] = mixed
        return made

    def closure() -> torch.Tensor:
        solver.zero_grad()
        made = act()
        loss = torch.zeros((), dtype=torch.float64)
        for (own, both, size), each in zip(
            (first, second), (made, torch.linalg.inv(made).T), strict=True
        ):
            loss = loss + ((each @ own * each).sum() - 2 * (each.T * both).sum()) / size
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver = torch.optim.LBFGS([turned, mixed], max_iter=STEPS, line_search_fn="strong_wolfe")
    try:
        solver.step(closure)  # type: ignore[no-untyped-call]
    except RuntimeError:  # what torch raises for a singular map is one
        return start
    # Rounded, so that the last bits of a solver do not reach the weights.
    found = np.asarray(act().detach().numpy().astype(np.float32).astype(np.float64))
    whole = bool(np.isfinite(found).all()) and np.linalg.cond(found) < WORST
    return found if whole and sides.mapped(found).distance < sides.mapped(start).distance else start


def _square(side: Matrix) -> float:
    return float(np.sum(side**2)) or 1.0


def _group_of(groups: Groups, attention: Attention, free: Sequence[Freedom]) -> int | None:
    """The group whose units are the heads that share keys; None where none may be moved."""
    matrix = attention.matrices[SIDES[free[0].pair][1]]
    axes = groups.tensors.get(matrix.name, ())
    first = axes[matrix.axis][0] if len(axes) > matrix.axis and axes[matrix.axis] else None
    if first is None or first.group is None or first.size != attention.counts.groups:
        return None
    return first.group if groups.reorders(first.group) else None


def _distances(
    base: Checkpoint,
    read: Callable[[str], torch.Tensor],
    attention: Attention,
    free: Sequence[Freedom],
) -> npt.NDArray[np.float64]:
    """Distance of every head of the base to every mapped head of the expert, ``(heads, heads)``."""
    count = attention.counts.groups
    total = np.zeros((count, count))
    for one in free:
        sides = [*sides_of(base.read, read, attention, one.pair)]
        for i, ours in enumerate(sides):
            for j, theirs in enumerate(sides):
                pair = Sides(ours.first, ours.second, theirs.own_first, theirs.own_second)
                total[i, j] += pair.mapped(begun(pair, one)).distance
    return total
