"""What a study with ``operator: auto`` measures first, and what it then goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mergesearch.merging import Field, Layout, Recipe
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.operators.blend import member_options
from mergesearch.search.plan.anchors import Anchor

#: Multiples of an operator's default coefficient at which it is measured. Defaults are for experts
#: that hardly interfere; where they do, less is better (``experiments/0011-operator-auto``).
SCALES = (0.7, 1.0)


@dataclass(frozen=True)
class Listed:
    """An operator that was considered.

    Attributes:
        name: Its name.
        seconds: Expected preparation for all of its measurements, without runs of the experts.
        reason: Why it is not measured; empty if it is.
    """

    name: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """Operators that a search goes on from.

    Attributes:
        members: Their names, the leader first.
        coefficients: Of each, the one with which it was best.
    """

    members: tuple[str, ...]
    coefficients: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"members": list(self.members), "coefficients": list(self.coefficients)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Choice:
        """Inverse of :meth:`to_dict`."""
        return cls(tuple(data["members"]), tuple(data["coefficients"]))


@dataclass(frozen=True)
class Survey:
    """The operators of a study that chooses among them.

    Attributes:
        template: Task arithmetic on the study's experts, with coefficients 0: what workers hold
            while operators are measured.
        listed: Every operator that was considered.
        keep: How many the search goes on from.
        calibration: Items for those that run the experts, or None.
        free: Operators that may be chosen because every study measures them.
        choice: Those that were chosen; while none were, the first of the list stand in for them.
        decided: Whether they were.
    """

    template: Recipe
    listed: tuple[Listed, ...]
    keep: int
    calibration: Mapping[str, Any] | None
    free: tuple[str, ...]
    choice: Choice
    decided: bool = False

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the operators that are measured, in the order of the list."""
        return tuple(one.name for one in self.listed if not one.reason)

    def options(self, name: str) -> dict[str, Any]:
        """The hyperparameters of an operator in this study."""
        return member_options(OPERATORS[name], self.calibration)

    def single(self, name: str) -> Recipe:
        """The study's experts merged by one operator, without coefficients."""
        options = tuple(sorted(self.options(name).items()))
        return replace(self.template, operator=name, hyperparameters=options)

    def blend(self, layout: Layout) -> Recipe:
        """The recipe that the search is about, with coefficients 0."""
        given = None if self.calibration is None else dict(self.calibration)
        options = OPERATORS["blend"].complete(
            {
                "members": [*self.choice.members],
                "scales": [*self.choice.coefficients],
                "calibration": given,
            }
        )
        count = OPERATORS["blend"].directions(len(self.template.experts), options)
        return replace(
            self.template,
            operator="blend",
            hyperparameters=tuple(sorted(options.items())),
            field=Field.constant(layout.size, np.zeros(count)),
        )

    def anchors(self, layout: Layout) -> list[Anchor]:
        """Every measured operator, at multiples of its default coefficient."""
        experts = len(self.template.experts)
        found = []
        for name in self.measured:
            operator = OPERATORS[name]
            options = self.options(name)
            for scale in SCALES:
                value = scale * operator.default(experts, options)
                field = Field.constant(
                    layout.size, np.full(operator.directions(experts, options), value)
                )
                found.append(Anchor(f"{name} {value:.3g}", self.single(name).with_field(field)))
        return found

    def leader_rows(self) -> int:
        """How many directions of the blend are the leader's."""
        leader = self.choice.members[0]
        return OPERATORS[leader].directions(len(self.template.experts), self.options(leader))

    def in_blend(self, recipe: Recipe) -> Field | None:
        """The coefficients with which the blend is a known merge, or None.

        Merges of the leader are the same bit for bit, those of the others within rounding.
        """
        leader, *others = self.choice.members
        field = recipe.field
        rows = self.leader_rows()
        weights = np.zeros((len(others), field.segments))
        if recipe.basis_key == self.single(leader).basis_key:
            return Field(field.boundaries, np.vstack([field.values, weights]))
        coefficient = shared_coefficient(recipe)
        for index, name in enumerate(others):
            same = recipe.basis_key == self.single(name).basis_key
            if same and coefficient == self.choice.coefficients[index + 1]:
                weights[index] = 1.0
                own = np.full((rows, field.segments), self.choice.coefficients[0])
                return Field(field.boundaries, np.vstack([own, weights]))
        return None


def shared_coefficient(recipe: Recipe) -> float | None:
    """The one coefficient of a merge, or None where it has several."""
    first = float(recipe.field.values.flat[0])
    return first if bool(np.all(recipe.field.values == first)) else None
