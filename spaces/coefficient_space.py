"""A box of numbers, and the merge that each point stands for."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from merging import Field, Recipe

Point = npt.NDArray[np.float64]


class Space(Protocol):
    """What a search needs to know of a space. All arrays are float64 ``(dim,)``."""

    names: tuple[str, ...]
    lower: Point
    upper: Point
    start: Point

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``."""

    def encode(self, field: Field) -> Point | None:
        """The point whose field equals ``field`` exactly, or None if the space does not hold it."""
