"""Coefficients that may change anywhere: fields of few segments, each of any length.

A point holds the inner boundaries first, as positions of the flat index in increasing order, then
the coefficients of the first direction in every segment, then those of the second, and so on. A
field has one point: unused segments lie at the end, with boundaries at the end of the flat index
and the coefficients of the last used one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, InputError, Layout, Recipe
from mergesearch.spaces.base import (
    Gram,
    Point,
    Row,
    Space,
    check_field,
    check_point,
    direction_names,
    encode_in,
    fits,
)
from mergesearch.spaces.request import SpaceRequest

#: Directions with a number of their own in a summary; with the segments and three thirds, 16 at
#: most.
_SUMMARISED = 12


@dataclass(frozen=True, eq=False)
class SegmentSpace:
    """Fields of at most ``segments`` segments.

    Attributes:
        template: The merge whose field is replaced; its field tells the number of directions K.
        layout: Where the tensors lie.
        segments: Most segments S of a field.
        lower, upper, start: float64 ``(S - 1 + S * K,)``.
        gram: Inner products of base and rows, read from the weights when it is first called; None
            where there are none.
    """

    template: Recipe
    layout: Layout
    segments: int
    lower: Point
    upper: Point
    start: Point
    gram: Gram | None = None

    @property
    def title(self) -> str:
        """What the space is, in a few words."""
        return f"up to {self.segments} segments"

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return self.segments - 1 + self.segments * self.directions

    @property
    def directions(self) -> int:
        """Number of directions K."""
        return self.template.field.directions

    @cached_property
    def names(self) -> tuple[str, ...]:
        """``boundary 1``, ..., then ``DIRECTION/segment 1``, ..."""
        numbers = range(1, self.segments + 1)
        boundaries = [f"boundary {number}" for number in numbers[:-1]]
        directions = direction_names(self.template)
        return (
            *boundaries,
            *(f"{name}/segment {number}" for name in directions for number in numbers),
        )

    def field(self, point: Point) -> Field:
        """The coefficients at ``point``.

        Boundaries are rounded, moved into the flat index and sorted. NaN and infinite coefficients
        pass through; a boundary that is NaN is not used.
        """
        array = check_point(point, self.dim)
        size = self.layout.size
        boundaries = array[: self.segments - 1]
        values = array[self.segments - 1 :].reshape(self.directions, -1)
        inner = np.clip(np.rint(np.where(np.isnan(boundaries), size, boundaries)), 0, size)
        edges = np.concatenate([[0], np.sort(inner).astype(np.int64), [size]])
        used = np.diff(edges) > 0
        return Field(np.append(edges[:-1][used], size), values[:, used]).compact()

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``."""
        return self.template.with_field(self.field(point))

    def encode(self, field: Field) -> Point | None:
        """The only point of ``field``, or None if it has too many segments.

        The point may lie outside the bounds.
        """
        if not fits(field, self.directions, self.layout.size):
            return None
        compact = field.compact()
        spare = self.segments - compact.segments
        if spare < 0:
            return None
        values = np.concatenate(
            [compact.values, np.repeat(compact.values[:, -1:], spare, axis=1)], axis=1
        )
        return np.concatenate(
            [compact.boundaries[1:-1], np.full(spare, field.size), values.ravel()]
        )

    def refine(self, point: Point, finer: Space) -> Point:
        """The point of ``finer`` with the same coefficients; it may lie outside its bounds.

        Raises:
            RecipeError: If ``finer`` cannot hold them.
        """
        return encode_in(finer, self.field(point), f"this point of a space of {self.title}")

    def summary(self, point: Point) -> dict[str, float]:
        """Number of segments, and mean coefficients.

        Means are those of each of the first 12 directions, and of each third of the weights.
        """
        return self.summary_of(self.field(point))

    def summary_of(self, field: Field) -> dict[str, float]:
        """The same numbers for a field that may have more segments.

        Means are taken over the flat index.

        Raises:
            RecipeError: If ``field`` has another size or number of directions.
        """
        check_field(field, self.directions, self.layout.size)
        summary = {"segments": float(field.compact().segments)}
        means = _mean(field)
        names = direction_names(self.template)[:_SUMMARISED]
        summary |= {f"expert {name}": float(mean) for name, mean in zip(names, means, strict=False)}
        edges = np.linspace(0, field.size, 4).round().astype(int).tolist()
        for name, start, stop in zip(
            ("first", "middle", "last"), edges[:-1], edges[1:], strict=True
        ):
            part = field.restrict(start, stop) if start < stop else field
            summary[f"{name} third"] = float(_mean(part).mean())
        return summary

    def table(self) -> tuple[Row, ...]:
        """One row: any segment may hold any tensors, or parts of them."""
        return (
            Row(f"{self.title}, anywhere", self.layout.names, self.layout.parameters, self.dim),
        )


def segment_space(
    template: Recipe,
    layout: Layout,
    *,
    segments: int = 64,
    low: float,
    high: float,
    start: float,
    gram: Gram | None = None,
) -> SegmentSpace:
    """The space of fields with at most ``segments`` segments.

    Args:
        template: The merge whose field the points replace; its field tells the number of directions
            K.
        layout: Where the merged tensors lie.
        segments: Most segments of a field.
        low, high: Bounds of every coefficient; see :func:`arc_bounds`.
        start: Coefficient of every direction where the search begins.
        gram: Inner products of base and rows, for strategies that need them.

    Raises:
        InputError: If the bounds are not in order, or do not hold the start.
    """
    if not low < high:
        raise InputError(
            f"space.bounds: expected [low, high] with low < high, received [{low:g}, {high:g}]"
        )
    if not low <= start <= high:
        raise InputError(
            f"space.start: expected a coefficient in [{low:g}, {high:g}], received {start:g}"
        )
    inner = segments - 1
    coefficients = segments * template.field.directions
    # A boundary at 0 would cut nothing off.
    lower = np.concatenate([np.full(inner, 1.0), np.full(coefficients, float(low))])
    upper = np.concatenate([np.full(inner, float(layout.size)), np.full(coefficients, float(high))])
    begin = np.concatenate(
        [np.full(inner, float(layout.size)), np.full(coefficients, float(start))]
    )
    return SegmentSpace(template, layout, segments, lower, upper, begin, gram)


def build_segment_space(request: SpaceRequest) -> SegmentSpace:
    """The space of at most 64 segments, or as many as the section says.

    Raises:
        InputError: If the bounds are not in order, or do not hold the start.
    """
    section = request.section
    low, high = section.bounds or arc_bounds(*request.default_bounds)
    start = section.start if isinstance(section.start, float) else request.default_start
    return segment_space(
        request.template,
        request.model_layout,
        segments=section.segments or 64,
        low=low,
        high=high,
        start=start,
        gram=request.gram,
    )


def arc_bounds(low: float, high: float) -> tuple[float, float]:
    """Bounds for searches that follow arcs, where an operator's own are ``low`` and ``high``.

    They hold the base (0) and every expert (1), and twice as much: a point on the arc between two
    fields is a weighted sum of them whose weights add up to as much as √2 where the task vectors
    are at right angles, and arcs follow arcs.
    """
    return 2.0 * min(low, 0.0), 2.0 * max(high, 1.0)


def _mean(field: Field) -> npt.NDArray[np.float64]:
    """Mean of each direction over the positions ``(directions,)``; exact where it is constant."""
    weight = np.diff(field.boundaries)
    first = field.values[:, :1]
    with np.errstate(invalid="ignore", over="ignore"):
        mean: npt.NDArray[np.float64] = (
            field.values[:, 0] + ((field.values - first) * weight).sum(1) / field.size
        )
    return mean
