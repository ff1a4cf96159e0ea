"""A plain box for analytic problems without weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, InputError, Recipe
from mergesearch.spaces.base import (
    SUMMARY_SIZE,
    Point,
    Row,
    Space,
    check_field,
    check_gradient,
    check_point,
    encode_in,
    fits,
    named_values,
)
from mergesearch.spaces.request import SpaceRequest, check_start, coefficient_bounds


@dataclass(frozen=True, eq=False)
class BoxSpace:
    """A box whose points are fields of one direction and ``dim`` segments of length 1.

    Attributes:
        dim: Number of coordinates.
        lower, upper, start: float64 ``(dim,)``.
        template: Recipe without weights.
    """

    dim: int
    lower: Point
    upper: Point
    start: Point
    template: Recipe

    @property
    def title(self) -> str:
        """What the space is, in a few words."""
        return f"box of {self.dim}"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """``x0``, ``x1``, ..."""
        return tuple(f"x{index}" for index in range(self.dim))

    def field(self, point: Point) -> Field:
        """One segment per coordinate."""
        return Field(np.arange(self.dim + 1), check_point(point, self.dim)[None, :].copy())

    def pull_back(self, point: Point, gradient: npt.NDArray[np.float64]) -> Point:
        """The only row of ``gradient`` ``(1, dim)``: coordinates are the field's values.

        Raises:
            RecipeError: If the gradient has another shape.
        """
        check_point(point, self.dim)
        check_gradient(gradient, (1, self.dim))
        return np.array(gradient[0], dtype=np.float64)

    def decode(self, point: Point) -> Recipe:
        """The template with the coordinates as its field."""
        return self.template.with_field(self.field(point))

    def encode(self, field: Field) -> Point | None:
        """The coordinates of ``field``, or None if it has another size or number of directions."""
        if not fits(field, 1, self.dim):
            return None
        return self._values(field)

    def refine(self, point: Point, finer: Space) -> Point:
        """The same coordinates, in a box of the same dimension.

        Raises:
            RecipeError: If ``finer`` is anything else.
        """
        return encode_in(finer, self.field(point), f"a point of a {self.title} space")

    def summary(self, point: Point) -> dict[str, float]:
        """The coordinates if there are at most 16, else numbers about them.

        Those are their mean, their extremes, and the root mean square distance from the start.
        """
        array = check_point(point, self.dim)
        if self.dim <= SUMMARY_SIZE:
            return named_values(self.names, array)
        return {
            "mean": float(array.mean()),
            "minimum": float(array.min()),
            "maximum": float(array.max()),
            "distance": float(np.sqrt(np.mean((array - self.start) ** 2))),
        }

    def summary_of(self, field: Field) -> dict[str, float]:
        """The summary of the point of ``field``.

        Raises:
            RecipeError: If ``field`` has another size or number of directions.
        """
        check_field(field, 1, self.dim)
        return self.summary(self._values(field))

    def table(self) -> tuple[Row, ...]:
        """One row without tensors."""
        return (Row("box", (), 0, self.dim),)

    def _values(self, field: Field) -> Point:
        values: Point = field.at(np.arange(self.dim))[0]
        return values


def build_box_space(request: SpaceRequest) -> BoxSpace:
    """The box of an analytic problem.

    Raises:
        InputError: If ``dim`` is missing, a key of models is given, or a value is not allowed.
    """
    section = request.section
    low, high = coefficient_bounds(request)
    of_models = ("granularity", "chunks", "depth", "groups", "exclude")
    given = [key for key in of_models if getattr(section, key)]
    if given:
        raise InputError(
            f"space.{given[0]}: only allowed with models; an analytic problem has dim, bounds and "
            "start"
        )
    dim = section.dim
    if dim is None or dim < 1:
        raise InputError(f"space.dim: expected a whole number of at least 1, received {dim}")
    start = _start(section.start, request.default_start, dim)
    box = BoxSpace(dim, np.full(dim, low), np.full(dim, high), start, request.template)
    check_start(section, box)
    return box


def _start(given: float | list[float] | None, default: float, dim: int) -> Point:
    values = float(default) if given is None else given
    if isinstance(values, float):
        return np.full(dim, values, np.float64)
    if len(values) != dim:
        raise InputError(
            f"space.start: expected a number or a list of {dim}, received a list of {len(values)}"
        )
    return np.array(values, np.float64)
