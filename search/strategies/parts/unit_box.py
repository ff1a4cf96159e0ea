"""The free coordinates of a problem's box, scaled to the unit cube."""

from __future__ import annotations

import numpy as np

from mergesearch.search.strategies.base import Point, Problem


class UnitBox:
    """Maps points of a box to the unit cube of its free coordinates and back.

    Attributes:
        free: Places of the coordinates that are not fixed, ``(dim,)``; ``dim`` below is their
            number.
    """

    def __init__(self, problem: Problem) -> None:
        self.free = np.flatnonzero(problem.upper > problem.lower)
        self._lower = problem.lower[self.free]
        self._upper = problem.upper[self.free]
        self._fixed = problem.lower

    @property
    def dim(self) -> int:
        """Number of free coordinates."""
        return int(self.free.size)

    def to_unit(self, point: Point) -> Point:
        """Point of the box to the unit cube ``(dim,)``; points outside move to the nearest face."""
        unit: Point = np.clip(
            (point[self.free] - self._lower) / (self._upper - self._lower), 0.0, 1.0
        )
        return unit

    def to_point(self, unit: Point) -> Point:
        """Unit cube ``(dim,)`` to a point of the box; fixed coordinates keep their only value."""
        point = self._fixed.copy()
        point[self.free] = np.clip(
            self._lower + (self._upper - self._lower) * unit, self._lower, self._upper
        )
        return point
