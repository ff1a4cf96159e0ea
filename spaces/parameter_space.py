"""A plain box of the parameters of a merge that depends on its input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mergesearch.merging import Field, Recipe, RecipeError
from mergesearch.spaces.coefficient_space import Point, Row, Space, check_point


@dataclass(frozen=True, eq=False)
class ParameterSpace:
    """A box whose points are parameters of a recipe's routing; the coefficient field stays as it
    is.

    Attributes:
        names: Names of the parameters.
        lower, upper, start: float64 ``(dim,)``.
        template: Recipe whose routing is set.
        fixed: ``(name, value)`` pairs of the routing that no coordinate moves, the method among
            them.
    """

    names: tuple[str, ...]
    lower: Point
    upper: Point
    start: Point
    template: Recipe
    fixed: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """What the space is, in a few words."""
        return f"parameters of {dict(self.fixed).get('method', 'an input-dependent merge')}"

    def field(self, point: Point) -> Field:
        """The template's, whatever the point."""
        check_point(point, len(self.names))
        return self.template.field

    def decode(self, point: Point) -> Recipe:
        """The template, routed by the parameters at ``point``."""
        values = zip(self.names, check_point(point, len(self.names)).tolist(), strict=True)
        return replace(
            self.template, routing=tuple(sorted({**dict(self.fixed), **dict(values)}.items()))
        )

    def encode(self, field: Field) -> Point | None:
        """None: no coefficients alone are a point of this space."""
        return None

    def refine(self, point: Point, finer: Space) -> Point:
        """The same parameters in another box of them.

        Raises:
            RecipeError: If ``finer`` is anything else.
        """
        if (
            not isinstance(finer, ParameterSpace)
            or finer.names != self.names
            or finer.title != self.title
        ):
            raise RecipeError(
                f"refine: a {finer.title} space cannot hold a point of a {self.title} space"
            )
        return check_point(point, len(self.names)).copy()

    def summary(self, point: Point) -> dict[str, float]:
        """The parameters."""
        return dict(zip(self.names, check_point(point, len(self.names)).tolist(), strict=True))

    def summary_of(self, field: Field) -> dict[str, float]:
        """Nothing: a checkpoint has none of the parameters."""
        return {}

    def table(self) -> tuple[Row, ...]:
        """One row without tensors."""
        return (Row(self.title, (), 0, len(self.names)),)
