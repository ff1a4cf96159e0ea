"""What a library is told, and what it must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Task:
    """A problem in the unit box, minimised.

    Attributes:
        dim: Number of coordinates.
        objectives: Number of losses; each is 0 at the best anchor and 1 at the worst.
        budget: Number of evaluations.
        seed: Of every draw.
        start: The best anchor ``(dim,)``.
        sigma: Standard deviation of first draws, the same that our strategies take.
        points, losses: The anchors ``(anchors, dim)`` and ``(anchors, objectives)``.
    """

    dim: int
    objectives: int
    budget: int
    seed: int
    start: Array
    sigma: float
    points: Array
    losses: Array

    def draws(self, count: int) -> Array:
        """The start and normal draws around it ``(count, dim)``, folded into the box."""
        rng = np.random.default_rng([self.seed, 7])
        points = self.start + self.sigma * rng.standard_normal((count, self.dim))
        points[0] = self.start
        folded = np.abs(points) % 2.0
        return np.asarray(np.minimum(folded, 2.0 - folded))


class Library(Protocol):
    """An optimizer with numbered questions."""

    def ask(self) -> tuple[int, Array] | None:
        """A number and a point ``(dim,)``; None while results are awaited, or at the end."""

    def tell(self, number: int, losses: Array) -> None:
        """The losses ``(objectives,)`` at a question's point."""

    def best(self) -> Array | None:
        """The recommended point ``(dim,)``, where the library has one."""
