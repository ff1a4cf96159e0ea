"""The coordinates of one direction, and the coefficient of each group that they stand for.

First come the terms of the curves, then one coefficient for each group that no curve covers and
that is not held. A table of coefficients is ``(rows, groups + 1)``: one row for each direction, or
a single one that all directions share; its last column belongs to the tensors of no group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.spaces.base import Point
from mergesearch.spaces.groups import Group
from mergesearch.spaces.parts.curves import Curve

_Array = npt.NDArray[np.float64]
_Index = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class DirectionCoordinates:
    """The coordinates of one direction.

    Attributes:
        groups: The groups.
        curves: Curves over some of them.
        clip: Range into which the values of curves are clipped, if any.
        held: Indices of the groups whose coefficients no coordinate moves.
        values: Their coefficient of every direction ``(K,)``, or ``(1,)`` where all share one.
    """

    groups: tuple[Group, ...]
    curves: tuple[Curve, ...]
    clip: tuple[float, float] | None
    held: tuple[int, ...]
    values: tuple[float, ...]

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the coordinates; empty where one coefficient covers everything."""
        terms = [
            f"{curve.name}/{term}".lstrip("/")
            for curve in self.curves
            for term in curve.basis.term_names
        ]
        whole = len(self.groups) == 1 and self.groups[0].name == "all"
        return (*terms, *("" if whole else self.groups[index].name for index in self.own))

    @cached_property
    def own(self) -> _Index:
        """Indices of the groups with a coefficient of their own."""
        covered = {int(index) for curve in self.curves for index in curve.groups} | {*self.held}
        return np.array(
            [index for index in range(len(self.groups)) if index not in covered], np.intp
        )

    @cached_property
    def curve_terms(self) -> tuple[tuple[Curve, slice], ...]:
        """Curves with the positions of their terms among the coordinates."""
        stops = np.cumsum([curve.basis.terms for curve in self.curves], dtype=int).tolist()
        return tuple(
            (curve, slice(stop - curve.basis.terms, stop))
            for curve, stop in zip(self.curves, stops, strict=True)
        )

    def rows(self, point: Point) -> _Array:
        """The coordinates of a point, one row per direction ``(rows, labels)``."""
        return point.reshape(-1, len(self.labels))

    def coefficients(self, rows: _Array) -> _Array:
        """The coefficients ``(rows, groups + 1)`` of coordinates ``(rows, labels)``."""
        table = np.zeros((rows.shape[0], len(self.groups) + 1))
        for curve, terms in self.curve_terms:
            values = curve.basis.evaluate(rows[:, terms])[:, curve.rows]
            table[:, curve.groups] = values if self.clip is None else _clip(values, *self.clip)
        if self.held:
            table[:, self.held] = np.array(self.values)[:, None]
        if self.own.size:
            table[:, self.own] = rows[:, -self.own.size :]
        return table

    def pull_back(self, rows: _Array, gradient: _Array) -> _Array:
        """Gradient with respect to the coordinates ``(rows, labels)``; 0 where values are clipped.

        Args:
            rows: Coordinates at which it is taken ``(rows, labels)``.
            gradient: Gradient with respect to the coefficients ``(rows, groups + 1)``.
        """
        pulled = np.zeros(rows.shape)
        for curve, terms in self.curve_terms:
            slope = gradient[:, curve.groups]
            if self.clip is not None:
                values = curve.basis.evaluate(rows[:, terms])[:, curve.rows]
                slope = np.where((values < self.clip[0]) | (values > self.clip[1]), 0.0, slope)
            pulled[:, terms] = slope @ curve.basis.matrix[curve.rows]
        if self.own.size:
            pulled[:, -self.own.size :] = gradient[:, self.own]
        return pulled

    def solve(self, coefficients: _Array) -> _Array:
        """Coordinates ``(rows, labels)`` whose coefficients come closest to ``(rows, groups)``."""
        terms = [
            curve.basis.solve(coefficients[:, curve.groups], curve.rows) for curve in self.curves
        ]
        return np.concatenate([*terms, coefficients[:, self.own]], axis=1)

    def with_terms_of(self, coarse: DirectionCoordinates, source: _Array, target: _Array) -> _Array:
        """``target`` with the terms of coarser curves of the same basis, then zeros.

        Args:
            coarse: The coordinates to copy from.
            source: Coordinates of the coarser space ``(rows, labels)``.
            target: Coordinates of this one ``(rows, labels)``; the rest of them is kept.
        """
        copied = target.copy()
        for curve, terms in self.curve_terms:
            for other, origin in coarse.curve_terms:
                if curve.extends(other):
                    copied[:, terms] = 0.0
                    copied[:, terms.start : terms.start + other.basis.terms] = source[:, origin]
        return copied


def _clip(values: _Array, low: float, high: float) -> _Array:
    """Clip finite values; the others must reach the merge, which calls the trial infeasible."""
    return np.where(np.isfinite(values), np.clip(values, low, high), values)
