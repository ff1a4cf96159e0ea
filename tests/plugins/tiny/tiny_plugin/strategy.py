"""The strategy ``walk``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mergesearch.search import Problem, Suggestion, TrialResult


class Walk:
    """Draws points around the start.

    Args:
        problem: The box.
        seed: Seed of the draws.
        step: Standard deviation as a share of each side.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = False

    def __init__(self, problem: Problem, seed: int, *, step: float = 0.1) -> None:
        self._problem = problem
        self._step = step
        self._rng = np.random.default_rng(seed)
        self._asked = 0

    def ask(self, count: int) -> list[Suggestion]:
        """Points around the start."""
        return [self._next() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Learn nothing."""

    def best(self) -> list[np.ndarray]:
        """Nothing."""
        return []

    def _next(self) -> Suggestion:
        problem = self._problem
        move = self._step * problem.width * self._rng.standard_normal(problem.dim)
        self._asked += 1
        point = np.clip(problem.start + move, problem.lower, problem.upper)
        return Suggestion(self._asked - 1, point)
