"""A plain box for analytic problems without weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, Recipe, RecipeError
from mergesearch.spaces.coefficient_space import SUMMARY_SIZE, Point, Row, Space, check_point


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
        if gradient.shape != (1, self.dim):
            raise RecipeError(
                f"pull back: expected a gradient of shape {(1, self.dim)}, received "
                f"{gradient.shape}"
            )
        return np.array(gradient[0], dtype=np.float64)

    def decode(self, point: Point) -> Recipe:
        """The template with the coordinates as its field."""
        return self.template.with_field(self.field(point))

    def encode(self, field: Field) -> Point | None:
        """The coordinates of ``field``, or None if it has another size or number of directions."""
        if field.directions != 1 or field.size != self.dim:
            return None
        values: Point = field.at(np.arange(self.dim))[0]
        return values

    def refine(self, point: Point, finer: Space) -> Point:
        """The same coordinates, in a box of the same dimension.

        Raises:
            RecipeError: If ``finer`` is anything else.
        """
        found = finer.encode(self.field(point))
        if found is None:
            raise RecipeError(
                f"refine: a {finer.title} space cannot hold a point of a {self.title} space"
            )
        return found

    def summary(self, point: Point) -> dict[str, float]:
        """The coordinates up to 16 of them, else their mean, extremes, and root mean square
        distance from the start.
        """
        array = check_point(point, self.dim)
        if self.dim <= SUMMARY_SIZE:
            return dict(zip(self.names, array.tolist(), strict=True))
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
        point = self.encode(field)
        if point is None:
            raise RecipeError(
                f"field: expected 1 direction over {self.dim} positions, received "
                f"{field.directions} over {field.size}"
            )
        return self.summary(point)

    def table(self) -> tuple[Row, ...]:
        """One row without tensors."""
        return (Row("box", (), 0, self.dim),)
