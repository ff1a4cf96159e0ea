"""Scrambled Sobol points around the start: the baseline that every search must beat.

Owen 1998, "Scrambling Sobol' and Niederreiter-Xing points", as in ``scipy.stats.qmc``. Uniform
sampling over the box is worse than not searching at all (good merges lie near the anchors), so the
points follow a normal distribution around the start, folded back into the box by reflection.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.sampling import reflect
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook

#: Sobol direction numbers exist up to this dimension; beyond it, plain normal draws take over.
SOBOL_LIMIT = 21_201


class Sobol:
    """Scrambled Sobol points, normally distributed around the start.

    Args:
        problem: The box and the start.
        seed: Seed of the scrambling.
        sigma: Standard deviation of the points as a fraction of the range of each coordinate.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = False

    def __init__(
        self, problem: Problem, seed: int, *, sigma: Annotated[float, Bound(gt=0)] = 0.2
    ) -> None:
        self._problem = problem
        self._sigma = sigma
        self._rng = np.random.default_rng(seed)
        self._book = SuggestionBook[None]()
        self._sobol = None
        if problem.dim <= SOBOL_LIMIT:
            from scipy.stats import qmc

            self._sobol = qmc.Sobol(problem.dim, scramble=True, rng=self._rng)

    def ask(self, count: int) -> list[Suggestion]:
        """The next ``count`` points of the sequence; results do not matter."""
        return [self._book.issue(self._point()) for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Ignore the results: points do not depend on them."""

    def best(self) -> list[Point]:
        """Nothing beyond the best trials."""
        return []

    def _point(self) -> Point:
        problem = self._problem
        # x = start + σ · (upper − lower) · z, z a standard normal vector
        point = problem.start + self._sigma * problem.width * self._normal()
        return reflect(point, problem.lower, problem.upper)

    def _normal(self) -> Point:
        """A standard normal vector ``(dim,)``, quasi-random where Sobol numbers exist."""
        if self._sobol is None:
            return self._rng.standard_normal(self._problem.dim)
        from scipy.special import ndtri

        with warnings.catch_warnings():
            # Points come one at a time; the balance properties that scipy warns about hold at
            # powers of two.
            warnings.simplefilter("ignore", UserWarning)
            uniform = self._sobol.random(1)[0]
        # A scrambled coordinate can be exactly 0, whose quantile is -inf.
        quantile: Point = ndtri(np.clip(uniform, 1e-12, 1 - 1e-12))
        return quantile
