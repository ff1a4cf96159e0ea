"""Crossover of two fields: near one parent up to a split point, near the other after it.

A merge is base + Σ_k c_k τ_k, so a point on the arc between two merges, which is a weighted sum
of both, is again a field: the weights times the coefficients. All that the weights themselves need
is the angle between the merges, and that follows from the inner products of the directions on the
segments. No model is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field
from mergesearch.spaces.base import Gram

Floats = npt.NDArray[np.float64]

#: Sine of the angle up to which the arc is a straight line.
_STRAIGHT = 1e-6

#: Weight of a position beside its share of the squared length: where all directions are zero,
#: length decides.
_FAINT = 1e-12


@dataclass(frozen=True, eq=False)
class Crossed:
    """A child before it is fitted into a box.

    Attributes:
        field: Its coefficients, on the boundaries of both parents and the split point.
        mass: Squared length of each direction on each segment ``(segments, K)``.
    """

    field: Field
    mass: Floats


def cross(first: Field, second: Field, gram: Gram, share: float, split: int) -> Crossed:
    """The child of two fields, before it is fitted into a box.

    Args:
        first, second: The parents, of the same size and directions.
        gram: Inner products of base and directions; the angle is that of the task vectors, around
            the base.
        share: How far the child lies from the first parent to the second, 0 to 1, at positions
            before ``split``; from there on it lies as far from the second to the first.
        split: Position of the flat index, 0 to its size; at the size there is no second part.
    """
    cuts = np.unique(np.concatenate([first.boundaries, second.boundaries, [split]]))
    one = first.at(cuts[:-1])
    other = second.at(cuts[:-1])
    inner = gram(cuts)[:, 1:, 1:]
    towards = np.where(cuts[:-1] < split, share, 1.0 - share)
    weights = arc_weights(towards, angle_between(one, other, inner))
    return Crossed(
        Field(cuts, weights[0] * one + weights[1] * other), np.diagonal(inner, axis1=1, axis2=2)
    )


def angle_between(one: Floats, other: Floats, inner: Floats) -> float:
    """Angle between two merges over all segments, seen from the base; 0 if one is the base.

    Args:
        one, other: Coefficients ``(K, segments)``.
        inner: Inner products of the directions ``(segments, K, K)``.
    """

    def product(left: Floats, right: Floats) -> float:
        return float((left.T * (inner * right.T[:, None, :]).sum(axis=2)).sum())

    # cos Ω = <x, y> / (|x| |y|), each product a sum over segments of c' G c
    length = np.sqrt(max(product(one, one), 0.0) * max(product(other, other), 0.0))
    return float(np.arccos(np.clip(product(one, other) / length, -1.0, 1.0))) if length > 0 else 0.0


def arc_weights(towards: Floats, angle: float) -> tuple[Floats, Floats]:
    """Weights of both ends of an arc at positions on it.

    They are sin((1 − t) Ω) / sin Ω and sin(t Ω) / sin Ω (Shoemake 1985, "Animating rotation with
    quaternion curves").

    Args:
        towards: Positions t: 0 is the first end and 1 the second; both are exact.
        angle: Between the ends; the line is straight where it, or what it lacks to a half turn, is
            next to nothing.
    """
    sine = np.sin(angle)
    if sine <= _STRAIGHT:
        return 1.0 - towards, towards
    return np.sin((1.0 - towards) * angle) / sine, np.sin(towards * angle) / sine


def limit(crossed: Crossed, most: int) -> Field:
    """The child with at most ``most`` segments.

    Neighbours are joined, first those that change the merge least. Joined segments get the mean of
    their coefficients, direction by direction, weighted by the squared length of the direction on
    each. What that changes in the merge, the directions taken to be at right angles, is Ward's
    distance (Ward 1963, "Hierarchical grouping to optimize an objective function").
    """
    boundaries = crossed.field.boundaries
    values = crossed.field.values.T.copy()
    mass = _positive(crossed.mass, np.diff(boundaries))
    count = len(values)
    cost = np.append(
        _ward(values[:-1], values[1:], mass[:-1], mass[1:]), np.inf
    )  # of joining with the next
    before = list(range(-1, count))
    after = list(range(1, count + 1))
    kept = np.ones(count, bool)
    for _ in range(count - most):
        here = int(cost.argmin())
        there = after[here]
        total = mass[here] + mass[there]
        values[here] += mass[there] / total * (values[there] - values[here])
        mass[here] = total
        kept[there] = False
        cost[there] = np.inf
        after[here] = after[there]
        before[after[there]] = here
        for left, right in ((here, after[here]), (before[here], here)):
            if left >= 0:
                known = right < count
                cost[left] = (
                    _ward(values[left], values[right], mass[left], mass[right]) if known else np.inf
                )
    return Field(np.append(boundaries[:-1][kept], boundaries[-1]), values[kept].T)


def _ward(one: Floats, other: Floats, mass: Floats, opposite: Floats) -> Floats:
    """Squared change of the merge ``(...)`` when segments ``(..., K)`` are joined.

    Σ_k m_k m'_k / (m_k + m'_k) · (c_k − c'_k)² (Ward 1963).
    """
    cost: Floats = (mass * opposite / (mass + opposite) * (one - other) ** 2).sum(axis=-1)
    return cost


def _positive(mass: Floats, lengths: npt.NDArray[np.int64]) -> Floats:
    """Squared lengths ``(segments, K)``, above 0 also where a direction is zero."""
    total = mass.sum(axis=0)
    density = np.where(total > 0, _FAINT * total / lengths.sum(), 1.0)
    return np.asarray(mass + lengths[:, None] * density)
