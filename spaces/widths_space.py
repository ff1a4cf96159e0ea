"""Widths of layers that hold units of several models, beside the coefficients of their merge.

PLeaS (Nasery 2024) keeps a share of the units of each layer apart, and chooses these shares under a
budget by an integer program. Here a coordinate of a width is the number of a level among given
shares; where a point asks for more than the budget, levels fall one by one, the one first that the
point wants least, so every point keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from mergesearch.merging import Field, InputError, Layout, Recipe
from mergesearch.merging.family.placing.widths import ChosenWidths
from mergesearch.spaces.base import SUMMARY_SIZE, Point, Row, Space, cannot_hold, check_point
from mergesearch.spaces.coefficient_space import CoefficientSpace
from mergesearch.spaces.parts.bit_allocation import Whole
from mergesearch.spaces.section import WidthsSpec

#: Share of units kept apart, in the order of the widths -> the space of coefficients there.
SpaceAt = Callable[[tuple[float, ...]], Space]
#: A coordinate reaches half a level beyond the last one, so that all levels have equal room.
HALF = 0.5


@dataclass(frozen=True, eq=False)
class WidthsSpace:
    """Coordinates of another space, and one for each width.

    Attributes:
        space_at: Gives the space of the coefficients; its names are the same at all shares.
        widths: Names of the widths.
        units: Number of units that each of them speaks of.
        choices: Shares of units that may be kept apart, in increasing order.
        begin: Level of each width where the search begins.
        mean: Most units kept apart, as a share of all; None for no limit.
        only: Whether widths alone are searched; the coefficients stay at their start.
    """

    space_at: SpaceAt
    widths: tuple[str, ...]
    units: tuple[int, ...]
    choices: tuple[float, ...]
    begin: tuple[int, ...]
    mean: float | None = None
    only: bool = False
    _spaces: dict[tuple[float, ...], Space] = field(default_factory=dict, repr=False)

    @property
    def title(self) -> str:
        """What the space is, in a few words."""
        count = len(self.widths)
        own = f"{count} width{'s' * (count > 1)}, {len(self.choices)} levels each"
        return own if self.only else f"{self.inner.title} and {own}"

    @property
    def inner(self) -> Space:
        """The space of the coefficients at the widths where the search begins."""
        return self._at(self._shares(np.array(self.begin)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the coordinates; those of widths are such as ``width/hidden_sizes.0``."""
        own = tuple(f"width/{name}" for name in self.widths)
        return own if self.only else (*self.inner.names, *own)

    @property
    def lower(self) -> Point:
        """Lower bounds."""
        return self._joined(self.inner.lower, np.full(len(self.widths), -HALF))

    @property
    def upper(self) -> Point:
        """Upper bounds."""
        highest = len(self.choices) - HALF
        return self._joined(self.inner.upper, np.full(len(self.widths), highest))

    @property
    def start(self) -> Point:
        """The start of the coefficients, with the widths of the study."""
        return self._joined(self.inner.start, np.array(self.begin, np.float64))

    def levels(self, point: Point) -> Whole:
        """Level of each width at ``point``, within the budget: ``(widths,)``."""
        wanted = check_point(point, len(self.names))[-len(self.widths) :]
        finite = np.nan_to_num(wanted, nan=0.0)
        levels = np.clip(np.rint(finite), 0, len(self.choices) - 1).astype(np.int64)
        if self.mean is None:
            return levels
        budget = self.mean * sum(self.units) * (1 + 1e-12)
        while levels.any() and np.dot(self._shares(levels), self.units) > budget:
            left = np.where(levels > 0, finite - levels, np.inf)
            levels[int(np.argmin(left))] -= 1
        return levels

    def fractions(self, point: Point) -> dict[str, float]:
        """Name of a width -> share of its units that is kept apart at ``point``."""
        return dict(zip(self.widths, self._shares(self.levels(point)), strict=True))

    def field(self, point: Point) -> Field:
        """The coefficients at ``point``, over the flat index that its widths give."""
        return self._space(point).field(self._inner_point(point))

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``."""
        return self._space(point).decode(self._inner_point(point))

    def layout_of(self, recipe: Recipe) -> Layout | None:
        """The flat index of a merge that this space has decoded; None for any other."""
        return next(
            (
                space.layout
                for space in self._spaces.values()
                if isinstance(space, CoefficientSpace) and space.layout.digest == recipe.layout
            ),
            None,
        )

    def encode(self, field: Field) -> Point | None:
        """The point with these coefficients at the widths of the start; None if there is none."""
        if self.only:
            return self.start if self.field(self.start) == field else None
        point = self.inner.encode(field)
        return None if point is None else self._joined(point, np.array(self.begin, np.float64))

    def refine(self, point: Point, finer: Space) -> Point:
        """The point of ``finer`` with the same coefficients and widths.

        Raises:
            RecipeError: If ``finer`` has other widths or levels.
        """
        if not isinstance(finer, WidthsSpace) or (
            (finer.widths, finer.units, finer.choices, finer.mean, finer.only)
            != (self.widths, self.units, self.choices, self.mean, self.only)
        ):
            raise cannot_hold(finer, f"a point of a {self.title} space")
        own = check_point(point, len(self.names))[-len(self.widths) :]
        if self.only:
            return own.copy()
        shares = self._shares(self.levels(point))
        inner = self._at(shares).refine(self._inner_point(point), finer._at(shares))
        return np.concatenate([inner, own])

    def summary(self, point: Point) -> dict[str, float]:
        """Shares of units that are kept apart, and the coefficients."""
        inner = {} if self.only else self._space(point).summary(self._inner_point(point))
        return self._summary(self.fractions(point), inner)

    def summary_of(self, field: Field) -> dict[str, float]:
        """The same for any field, with the widths of the start."""
        inner = {} if self.only else self.inner.summary_of(field)
        return self._summary(self.fractions(self.start), inner)

    def table(self) -> tuple[Row, ...]:
        """The rows of the coefficients, and one for each width."""
        rows = self.inner.table()
        if self.only:
            rows = tuple(replace(row, coefficients=0) for row in rows)
        return (*rows, *(Row(f"width/{name}", (), 0, 1) for name in self.widths))

    def _shares(self, levels: Whole) -> tuple[float, ...]:
        return tuple(self.choices[level] for level in levels.tolist())

    def _space(self, point: Point) -> Space:
        return self._at(self._shares(self.levels(point)))

    def _at(self, shares: tuple[float, ...]) -> Space:
        if shares not in self._spaces:
            self._spaces[shares] = self.space_at(shares)
        return self._spaces[shares]

    def _joined(self, inner: Point, own: Point) -> Point:
        return own if self.only else np.concatenate([inner, own])

    def _inner_point(self, point: Point) -> Point:
        array = check_point(point, len(self.names))
        return self.inner.start if self.only else array[: -len(self.widths)]

    def _summary(self, shares: dict[str, float], inner: dict[str, float]) -> dict[str, float]:
        kept = float(np.dot([*shares.values()], self.units)) / sum(self.units)
        numbers = {"units kept apart": kept}
        numbers |= dict([*inner.items()][: SUMMARY_SIZE // 2])
        numbers |= {f"width/{name}": share for name, share in shares.items()}
        return dict([*numbers.items()][:SUMMARY_SIZE])


def build_widths_space(section: WidthsSpec, chosen: ChosenWidths, space_at: SpaceAt) -> WidthsSpace:
    """The space that the section describes.

    Args:
        section: The ``space.widths`` section.
        chosen: The study's recipe, at widths of choice.
        space_at: Gives the space of the coefficients at given shares.

    Raises:
        InputError: If the widths of the study are not among the choices, or beyond the budget.
    """
    choices = _choices(section.choices)
    units = chosen.units
    begin = []
    for name, share in chosen.fractions.items():
        if share not in choices:
            raise InputError(
                f"space.widths.choices: expected the share that the search begins with, "
                f"align.fraction {share:g} of {name}, among them, received {list(choices)}"
            )
        begin.append(choices.index(share))
    space = WidthsSpace(
        space_at,
        tuple(units),
        tuple(units.values()),
        choices,
        tuple(begin),
        section.mean,
        section.only,
    )
    if not np.array_equal(space.levels(space.start), begin):
        raise InputError(
            f"space.widths.mean: expected at least what the search begins with, which keeps more "
            f"than {section.mean:g} of all units apart; lower align.fraction"
        )
    return space


def _choices(given: Sequence[float]) -> tuple[float, ...]:
    """The shares in increasing order.

    Raises:
        InputError: If there are not two different ones, from 0 to 1.
    """
    choices = tuple(sorted({float(each) for each in given}))
    if len(choices) < 2 or len(choices) != len(given) or choices[0] < 0 or choices[-1] > 1:
        raise InputError(
            "space.widths.choices: expected two or more different numbers from 0 to 1, received "
            f"{list(given)}"
        )
    return choices
