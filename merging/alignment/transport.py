"""Optimal-transport fusion: units are mixed softly instead of being reordered.

Imfeld et al., "Transformer Fusion with Optimal Transport" (ICLR 2024): the ground cost between a
unit of the base and one of the expert is the squared distance of their standardised activations,
the plan is Sinkhorn's (entropic, with uniform marginals), and the map ``T = n · plan`` takes the
place of a permutation on every axis that holds the units. Unlike a permutation, a soft map changes
what the expert computes; with ``smoothing`` going to 0 it becomes the permutation.

Heads are assigned whole, and channels are mixed within them. The residual stream has one map for
all layers, made of the activations at all its junctions together; norms use it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mergesearch.merging.alignment.groups import Groups
from mergesearch.merging.alignment.matching import Term, facing
from mergesearch.merging.alignment.moving import Moves

#: Iterations of Sinkhorn's algorithm, at most, and the error of marginals at which it stops.
ITERATIONS = 500
MARGINAL_ERROR = 1e-6


def transported(groups: Groups, terms: Sequence[Term], moves: Moves, smoothing: float) -> Moves:
    """Moves whose orders are replaced by soft maps, but for those of whole heads."""
    heads = {outer for group in groups.groups for outer in group.outer}
    orders = {index: order for index, order in moves.orders.items() if index in heads}
    turns = {}
    for index in groups.order:
        found = [term for term in terms if term.places(index)]
        if index in heads or not groups.reorders(index) or not found:
            continue
        cost = _cost(groups, found, index, moves)
        size = groups.groups[index].size
        maps = torch.stack([size * plan(one, smoothing) for one in cost])
        turns[index] = maps.reshape(*groups.outer_sizes(index), size, size)
    return replace(moves, orders=orders, turns=turns)


def _cost(groups: Groups, terms: Sequence[Term], index: int, moves: Moves) -> torch.Tensor:
    """Mean squared distance of units over all places that read them, ``(heads, size, size)``."""
    size = groups.groups[index].size
    outer = int(np.prod(groups.outer_sizes(index), dtype=int))
    outside = {i: o for i, o in moves.orders.items() if i in groups.groups[index].outer}
    total = torch.zeros(outer, size, size, dtype=torch.float64)
    for term in terms:
        ours, theirs = facing(
            groups, term, term.places(index)[0], index, None, outside, *term.read()
        )
        # Lengths are 1 over the units of a term; within heads they are as they come.
        total += torch.cdist(_unit(ours), _unit(theirs)) ** 2
    return total / len(terms)


def _unit(units: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(units, dim=-1)


def plan(cost: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Sinkhorn's plan with uniform marginals, in the domain of logarithms, ``(n, m)``.

    Cuturi, "Sinkhorn Distances" (NeurIPS 2013).
    """
    logits = -cost / smoothing
    rows = -np.log(cost.shape[0])
    columns = -np.log(cost.shape[1])
    left = torch.zeros(cost.shape[0], dtype=cost.dtype)
    right = torch.zeros(cost.shape[1], dtype=cost.dtype)
    for _ in range(ITERATIONS):
        left = rows - torch.logsumexp(logits + right, 1)
        right = columns - torch.logsumexp(logits + left[:, None], 0)
        made = torch.exp(logits + left[:, None] + right)
        if float((made.sum(1) * cost.shape[0] - 1).abs().max()) < MARGINAL_ERROR:
            break
    return made
