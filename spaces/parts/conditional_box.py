"""A box with conditions: choices, and coordinates that matter under one choice only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergesearch.spaces.base import Point


@dataclass(frozen=True)
class Dimension:
    """One coordinate of a space with conditions.

    Attributes:
        name: Name of the coordinate.
        kind: ``real``, or one of ``choices``: in their order (``integer``) or without one
            (``categorical``).
        low, high: The box. A choice is a real number in [0, number of choices) that is rounded
            down.
        choices: What the numbers 0, 1, ... stand for, unless the dimension is real.
        condition: (index of another dimension, number of its choice) under which this one is
            active; None: always.
    """

    name: str
    kind: Literal["real", "integer", "categorical"]
    low: float
    high: float
    choices: tuple[Any, ...] = ()
    condition: tuple[int, int] | None = None

    @property
    def middle(self) -> float:
        """The value that stands for no information."""
        return (self.low + self.high) / 2 if self.kind == "real" else len(self.choices) // 2 + 0.5


@dataclass(frozen=True, eq=False)
class ConditionalBox:
    """The coordinates of a space with conditions."""

    dimensions: tuple[Dimension, ...]

    @property
    def lower(self) -> Point:
        """Lower bounds ``(dim,)``."""
        return np.array([dimension.low for dimension in self.dimensions])

    @property
    def upper(self) -> Point:
        """Upper bounds ``(dim,)``."""
        return np.array([dimension.high for dimension in self.dimensions])

    @cached_property
    def middle(self) -> Point:
        """The point that stands for no information ``(dim,)``."""
        return np.array([dimension.middle for dimension in self.dimensions])

    def codes(self, points: Point) -> npt.NDArray[np.int64]:
        """Number of the choice of each dimension, ``(..., dim)``; 0 for real ones."""
        finite = np.where(np.isfinite(points), points, 0.0)
        codes = np.clip(np.floor(finite), 0, self._counts - 1).astype(np.int64)
        return np.where(self._is_choice, codes, 0)

    def active(self, points: Point) -> npt.NDArray[np.bool_]:
        """Whether the condition of each dimension is met, ``(..., dim)``."""
        parents, values = self._conditions
        return np.asarray((parents < 0) | (self.codes(points)[..., parents] == values))

    def canonical(self, points: Point) -> Point:
        """Choices in the middle of their bins, and inactive dimensions at their middle value."""
        chosen = np.where(self._is_choice, self.codes(points) + 0.5, points)
        return np.where(self.active(points), chosen, self.middle)

    @cached_property
    def _counts(self) -> npt.NDArray[np.int64]:
        return np.array([max(len(dimension.choices), 1) for dimension in self.dimensions], np.int64)

    @cached_property
    def _is_choice(self) -> npt.NDArray[np.bool_]:
        return np.array([dimension.kind != "real" for dimension in self.dimensions])

    @cached_property
    def _conditions(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        """Parent (-1: none) and number of its choice for each dimension."""
        conditions = [dimension.condition or (-1, 0) for dimension in self.dimensions]
        return np.array([parent for parent, _ in conditions], np.intp), np.array(
            [value for _, value in conditions]
        )
