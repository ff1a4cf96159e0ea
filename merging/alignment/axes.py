"""Axes of tensors and what ties them: the union-find structure behind permutation groups.

A dimension of a tensor is a product of axes, the outermost first: heads times channels, for
example. Operations tie axes (both operands of a sum have one order of units), split them (a view
of ``heads · channels`` as ``(heads, channels)``) and fix them (a slice needs the stored order).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Axis:
    """One axis, or the two that it was split into, or another that it was tied to.

    Attributes:
        size: Number of units.
        fixed: Whether the order of its units is fixed.
        tied: The axis that stands for it, if it is not itself.
        parts: Outer and inner axis that it was split into.
    """

    size: int
    fixed: bool = False
    tied: Axis | None = field(default=None, repr=False)
    parts: tuple[Axis, Axis] | None = field(default=None, repr=False)

    def root(self) -> Axis:
        """The axis that stands for this one."""
        axis = self
        while axis.tied is not None:
            axis = axis.tied
        return axis


#: A dimension as a product of axes, outermost first; empty where its size is 1.
Dimension = tuple[Axis, ...]


def fresh(size: int, *, fixed: bool = False) -> Dimension:
    """A dimension of one axis that nothing is tied to yet."""
    return () if size == 1 else (Axis(size, fixed),)


def leaves(dimension: Iterable[Axis]) -> Dimension:
    """The unsplit axes that a dimension is the product of."""
    found: list[Axis] = []
    for axis in dimension:
        root = axis.root()
        found += [root] if root.parts is None else leaves(root.parts)
    return tuple(found)


def size_of(dimension: Iterable[Axis]) -> int:
    """Number of units of a dimension."""
    return math.prod(axis.size for axis in dimension)


def fix(dimensions: Iterable[Dimension]) -> None:
    """Fix the order of units of all these dimensions."""
    for dimension in dimensions:
        for axis in leaves(dimension):
            axis.fixed = True


def is_free(dimensions: Iterable[Dimension]) -> bool:
    """Whether units of some dimension may still be reordered."""
    return any(not axis.fixed for dimension in dimensions for axis in leaves(dimension))


def split(axis: Axis, outer: int) -> Dimension:
    """Split an unsplit axis into an outer one of that size and an inner one."""
    parts = (Axis(outer, axis.fixed), Axis(axis.size // outer, axis.fixed))
    axis.parts = parts
    return parts


def tie(first: Dimension, second: Dimension) -> None:
    """Give two dimensions of the same size one order of units.

    Where they are products of axes that do not go into each other, both are fixed.
    """
    ours = list(leaves(first))
    theirs = list(leaves(second))
    while ours and theirs:
        one = _next(ours)
        other = _next(theirs)
        if one is other:
            continue
        if one.size == other.size:
            one.tied = other
            other.fixed |= one.fixed
        elif one.size % other.size == 0:
            ours[:0] = split(one, other.size)
            theirs.insert(0, other)
        elif other.size % one.size == 0:
            theirs[:0] = split(other, one.size)
            ours.insert(0, one)
        else:
            fix([(one, other, *ours, *theirs)])
            return


def reshaped(dimensions: Sequence[Dimension], sizes: Sequence[int]) -> list[Dimension]:
    """The dimensions of a tensor once it is viewed in another shape."""
    left = [axis for dimension in dimensions for axis in leaves(dimension)]
    found: list[Dimension] = []
    for size in sizes:
        taken: list[Axis] = []
        while (need := size // size_of(taken)) > 1 and left:
            axis = _next(left)
            if need % axis.size == 0:
                taken.append(axis)
            elif axis.size % need == 0:
                outer, inner = split(axis, need)
                taken.append(outer)
                left.insert(0, inner)
            else:
                fix(dimensions)
                return [fresh(each, fixed=True) for each in sizes]
        found.append(tuple(taken))
    return found


def _next(axes: list[Axis]) -> Axis:
    """Take the first unsplit axis; others may have been tied or split since they were listed."""
    first = leaves([axes.pop(0)])
    axes[:0] = first[1:]
    return first[0]
