"""Procrustes: channels of heads are turned so that they agree with the base's.

Queries and keys are read by their product alone, and so are values and outputs: any rotation of
the channels of a head leaves the model's function as it is. The best one is that of the orthogonal
Procrustes problem (Schönemann 1966): with ``M`` the inner products of the base's channels with the
expert's, over all tensors that hold them, it is ``U Vᵀ`` of ``M = U S Vᵀ``. Rotary positions turn
pairs of channels, and only turns of the same pairs commute with them: one angle for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mergesearch.merging.alignment.groups import Groups
from mergesearch.merging.alignment.matching import Term, facing
from mergesearch.merging.alignment.moving import Moves
from mergesearch.merging.alignment.probing import rotary_turn


def with_turns(groups: Groups, terms: Sequence[Term], moves: Moves) -> Moves:
    """The moves with the best rotation of every group of channels that may be turned."""
    turns = {}
    for index in groups.order:
        group = groups.groups[index]
        if group.kind == "permutation":
            continue
        products = _products(groups, terms, index, moves)
        turn = _angles(products) if group.kind == "rotary" else _rotations(products)
        turns[index] = turn.reshape(*groups.outer_sizes(index), group.size, group.size)
    return replace(moves, turns=turns)


def _products(groups: Groups, terms: Sequence[Term], index: int, moves: Moves) -> torch.Tensor:
    """Inner products of channels, ``(heads, size, size)``."""
    size = groups.groups[index].size
    outer = int(np.prod(groups.outer_sizes(index), dtype=int))
    total = torch.zeros(outer, size, size, dtype=torch.float64)
    for term in terms:
        for place in term.places(index):
            base, expert = term.read()
            ours, theirs = facing(groups, term, place, index, None, moves.orders, base, expert)
            # The order of the group itself comes before its turn.
            order = moves.orders.get(index)
            if order is not None:
                chosen = torch.from_numpy(order.reshape(outer, size, 1)).expand_as(theirs)
                theirs = theirs.gather(1, chosen)
            total += ours @ theirs.transpose(1, 2)
    return total


def _rotations(products: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(products)
    return torch.matmul(left, right)


def _angles(products: torch.Tensor) -> torch.Tensor:
    """Turns of pairs, from the argument of the complex inner product of each."""
    n = products.shape[-1] // 2
    real = products[:, :n, :n] + products[:, n:, n:]
    imaginary = products[:, n:, :n] - products[:, :n, n:]
    diagonal = torch.complex(real, imaginary).diagonal(dim1=1, dim2=2)
    return rotary_turn(diagonal.angle())
