"""A plain box of the parameters of a merge that depends on its input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mergesearch.merging import Field, Recipe
from mergesearch.spaces.base import Point, Row, Space, cannot_hold, check_point, named_values


@dataclass(frozen=True, eq=False)
class ParameterSpace:
    """A box of the parameters of a recipe's routing; the coefficient field stays as it is.

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
        """The field of the template, whatever the point."""
        check_point(point, len(self.names))
        return self.template.field

    def decode(self, point: Point) -> Recipe:
        """The template with the parameters at ``point`` as its routing."""
        parameters = named_values(self.names, check_point(point, len(self.names)))
        routing = dict(self.fixed) | parameters
        return replace(self.template, routing=tuple(sorted(routing.items())))

    def encode(self, field: Field) -> Point | None:
        """None: coefficients alone are no point of this space."""
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
            raise cannot_hold(finer, f"a point of a {self.title} space")
        return check_point(point, len(self.names)).copy()

    def summary(self, point: Point) -> dict[str, float]:
        """The parameters by name."""
        return named_values(self.names, check_point(point, len(self.names)))

    def summary_of(self, field: Field) -> dict[str, float]:
        """Nothing: a checkpoint has none of the parameters."""
        return {}

    def table(self) -> tuple[Row, ...]:
        """One row without tensors."""
        return (Row(self.title, (), 0, len(self.names)),)
