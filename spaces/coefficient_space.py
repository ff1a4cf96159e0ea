"""Coefficients that are constant on groups of tensors, or follow curves over depth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, Layout, Recipe
from mergesearch.spaces.base import (
    SUMMARY_SIZE,
    Point,
    Row,
    Space,
    cannot_hold,
    check_field,
    check_gradient,
    check_point,
    direction_names,
    fits,
    named_values,
)
from mergesearch.spaces.groups import Group
from mergesearch.spaces.parts.coefficient_coordinates import DirectionCoordinates
from mergesearch.spaces.parts.coefficient_summary import MeanCoefficients, coefficient_table
from mergesearch.spaces.parts.curves import Curve
from mergesearch.spaces.parts.partition import Partition, difference

#: Two fields are the same to rounding below this difference, relative to coefficients above one.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class CoefficientSpace:
    """Coefficients of the template's directions over groups of tensors and curves over depth.

    A point holds the coordinates of the first direction, then those of the second, and so on;
    within a direction first the terms of the curves, then one coefficient for each group that no
    curve covers.

    Attributes:
        template: The merge whose field is replaced; its field tells the number of directions K.
        layout: Where the tensors lie.
        title: What the space is, in a few words.
        groups: Disjoint groups of tensors; tensors in no group stay at the base, with coefficient
            0.
        lower, upper, start: float64 ``(dim,)``.
        curves: Curves over some of the groups.
        shared: One set of coordinates for all directions.
        clip: Range into which the values of curves are clipped, if any.
        held: Indices of the groups whose coefficients no coordinate moves.
        values: Their coefficient of every direction ``(K,)``, or ``(1,)`` where all share one.
    """

    template: Recipe
    layout: Layout
    title: str
    groups: tuple[Group, ...]
    lower: Point
    upper: Point
    start: Point
    curves: tuple[Curve, ...] = ()
    shared: bool = False
    clip: tuple[float, float] | None = None
    held: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return len(self.names)

    @property
    def directions(self) -> int:
        """Number of directions K."""
        return self.template.field.directions

    @cached_property
    def coordinates(self) -> DirectionCoordinates:
        """The coordinates of one direction."""
        return DirectionCoordinates(self.groups, self.curves, self.clip, self.held, self.values)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the coordinates, such as ``rotated/block 3/attention``."""
        labels = self.coordinates.labels
        if self.shared:
            return tuple(label or "global" for label in labels)
        return tuple(
            f"{name}/{label}" if label else name
            for name in direction_names(self.template)
            for label in labels
        )

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``."""
        return self.template.with_field(self.field(point))

    def field(self, point: Point) -> Field:
        """The coefficients at ``point``, exact on groups; NaN and infinity pass through."""
        rows = self.coordinates.rows(check_point(point, self.dim))
        values = self.coordinates.coefficients(rows)[:, self._partition.owners]
        return Field(
            self._partition.boundaries,
            np.repeat(values, self.directions, axis=0) if self.shared else values,
        )

    def pull_back(self, point: Point, gradient: npt.NDArray[np.float64]) -> Point:
        """Gradient with respect to the point, by the chain rule; 0 where values are clipped.

        Args:
            point: ``(dim,)``.
            gradient: Gradient with respect to the values of ``field(point)``,
                ``(directions, segments)``.

        Raises:
            RecipeError: If the gradient has another shape.
        """
        rows = self.coordinates.rows(check_point(point, self.dim))
        check_gradient(gradient, (self.directions, len(self._partition.owners)))
        summed = gradient.sum(axis=0, keepdims=True) if self.shared else gradient
        return self.coordinates.pull_back(rows, self._partition.sums(summed)).ravel()

    def encode(self, field: Field) -> Point | None:
        """The point whose field equals ``field`` exactly, or None; it may lie outside the bounds.

        Curves hold constants and lines between given ends exactly. Other cosines and splines are
        recovered only as far as floating point allows, so a field that came from them often gives
        None.
        """
        if not fits(field, self.directions, self.layout.size):
            return None
        point = self.project(field)
        return point if difference(self.field(point), field) == 0.0 else None

    def project(self, field: Field) -> Point:
        """The point whose field comes closest to ``field``.

        Groups take the parameter-weighted mean coefficient, curves go through those means by least
        squares (a line through its two ends). Fields that the space holds are read exactly, or to
        rounding for cosines and splines.

        Raises:
            RecipeError: If ``field`` has another size or number of directions.
        """
        check_field(field, self.directions, self.layout.size)
        means = self._partition.means(field)
        if self.shared:
            means = means[:1] + (means - means[:1]).mean(axis=0, keepdims=True)
        return self.coordinates.solve(means).ravel()

    def refine(self, point: Point, finer: Space) -> Point:
        """The point of ``finer`` with the same coefficients; it may lie outside its bounds.

        Values are copied where ``finer`` has a coefficient per group, and terms are copied to a
        curve of the same basis; a curve of another basis is fitted, and must meet the values to
        rounding (1e-12).

        Raises:
            RecipeError: If ``finer`` cannot hold them.
        """
        field = self.field(point)
        exact = finer.encode(field)
        if exact is not None:
            return exact
        if not isinstance(finer, CoefficientSpace):
            raise cannot_hold(finer, f"a point of a {self.title} space")
        fitted = finer.project(field)
        copied = finer.coordinates.with_terms_of(
            self.coordinates,
            self.coordinates.rows(check_point(point, self.dim)),
            finer.coordinates.rows(fitted),
        ).ravel()
        scale = max(1.0, float(np.abs(field.values).max()))
        for candidate in (copied, fitted):
            if difference(finer.field(candidate), field) <= ROUNDING * scale:
                return candidate
        tensor = self._partition.farthest(finer.field(fitted), field)
        raise cannot_hold(
            finer,
            f"this point of a {self.title} space: "
            f"coefficients differ at {tensor!r}; choose a granularity that splits it",
        )

    def summary(self, point: Point) -> dict[str, float]:
        """The coordinates if there are at most 16, else mean coefficients."""
        if self.dim <= SUMMARY_SIZE:
            return named_values(self.names, check_point(point, self.dim))
        return self._means.of(self.field(point))

    def summary_of(self, field: Field) -> dict[str, float]:
        """The same numbers for a field that the space need not hold, by :meth:`project`.

        Raises:
            RecipeError: If ``field`` has another size or number of directions.
        """
        if self.dim <= SUMMARY_SIZE:
            return named_values(self.names, self.project(field))
        check_field(field, self.directions, self.layout.size)
        return self._means.of(field)

    def table(self) -> tuple[Row, ...]:
        """Curves and groups with their tensors, parameters and number of coefficients."""
        copies = 1 if self.shared else self.directions
        return coefficient_table(self.coordinates, self.layout, copies)

    @cached_property
    def _partition(self) -> Partition:
        return Partition(self.layout, self.groups)

    @cached_property
    def _means(self) -> MeanCoefficients:
        return MeanCoefficients(self._partition, direction_names(self.template))
