"""CMA-ES, full and separable, asynchronous.

Hansen 2016, "The CMA Evolution Strategy: A Tutorial" (arXiv 1604.00772), engine: pycma. What we add:

* No generation barrier. Every ask draws one sample from the current distribution; when a population's worth of
  results is in, whatever their age, the distribution is updated. Stragglers never block a worker.
* Coordinates are scaled to the unit box and kept inside it by pycma's smooth linear-quadratic transformation; the
  engine is always told the unbounded sample that it drew.
* Failed trials enter the update ranked below the worst result of their batch.
* Several objectives are combined by the problem's weights, scaled by the range of the anchors.
* ``best`` recommends the distribution mean, which under noise beats the luckiest trial.

The engine draws from this strategy's own generator (option ``randn``); numpy's global generator is never touched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field as Bound

from search.strategy import Point, Problem, Suggestion, Told

#: Full covariance up to this dimension, separable above (update cost grows with its square).
FULL_LIMIT = 200
#: Above this dimension a larger population pays: less noise in each step.
WIDE_LIMIT = 256
WIDE_POPULATION = 32


class CmaEs:
    """Asynchronous CMA-ES.

    Args:
        problem: The box and how losses combine.
        seed: Seed of the strategy's generator.
        sigma: First step size as a fraction of the range; default 0.15, and 0.1 above 100 dimensions.
        population: Results per update; default ``4 + 3 ln d``, at least 32 above 256 dimensions.
        covariance: ``full``, ``separable`` (diagonal), or ``auto``: full up to 200 dimensions.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        sigma: Annotated[float, Bound(gt=0, le=1)] | None = None,
        population: Annotated[int, Bound(ge=4)] | None = None,
        covariance: Literal["auto", "full", "separable"] = "auto",
    ) -> None:
        self._problem = problem
        self._rng = np.random.default_rng(seed)
        self._free = np.flatnonzero(problem.upper > problem.lower)
        self._drawn: dict[int, Point] = {}  # suggestion id -> unbounded sample, until told
        self._batch: list[tuple[Point, float | None]] = []  # results since the last update
        self._asked = 0
        self._engine: Any = None
        if self._free.size:
            self._start_engine(sigma, population, covariance)

    def _start_engine(self, sigma: float | None, population: int | None, covariance: str) -> None:
        import cma
        from cma.transformations import BoxConstraintsLinQuadTransformation

        dim = self._free.size
        self._population = population or default_population(dim)
        self._transform = BoxConstraintsLinQuadTransformation([[0.0, 1.0]])
        separable = covariance == "separable" or (covariance == "auto" and dim > FULL_LIMIT)
        options = {
            "popsize": self._population,
            "CMA_diagonal": separable,
            # Mirrored and mean-shift samples exist only in whole populations, and we draw one by one.
            "CMA_mirrors": 0,
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
            "randn": lambda *shape: self._rng.standard_normal(shape),
            "seed": math.nan,  # NaN: leave numpy's global generator alone
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
        }
        with _quiet():
            # pycma has no one-dimensional mode: a second coordinate that nothing depends on stands in.
            start = np.resize(self._to_engine(self._problem.start), max(dim, 2))
            self._engine = cma.CMAEvolutionStrategy(start, sigma or (0.15 if dim <= 100 else 0.1), options)

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` samples of the current distribution."""
        suggestions = []
        for _ in range(count):
            point = self._problem.start
            if self._engine is not None:
                with _quiet():
                    drawn = np.array(self._engine.ask(1)[0])
                self._drawn[self._asked] = drawn
                point = self._to_box(drawn)
            suggestions.append(Suggestion(self._asked, point))
            self._asked += 1
        return suggestions

    def tell(self, trials: Sequence[Told]) -> None:
        """Collect results; update the distribution when a population's worth is in."""
        if self._engine is None:
            return
        for trial in trials:
            loss = None if trial.losses is None else self._problem.scalarise(trial.losses)
            self._batch.append((self._sample_of(trial), loss))
            if len(self._batch) == self._population:
                self._update()

    def _sample_of(self, trial: Told) -> Point:
        """The engine's sample behind a told point; a point that was not drawn here is mapped back."""
        drawn = self._drawn.pop(trial.id)
        if np.allclose(self._to_box(drawn), trial.point, rtol=0, atol=1e-9):
            return drawn
        return np.resize(self._to_engine(trial.point), drawn.size)

    def best(self) -> list[Point]:
        """The mean of the current distribution."""
        return [] if self._engine is None else [self._to_box(np.array(self._engine.mean))]

    def _update(self) -> None:
        batch, self._batch = self._batch, []
        losses = [loss for _, loss in batch if loss is not None]
        if not losses:
            return  # nothing but failures: no ranking to learn from
        worst = max(losses)
        margin = (worst - min(losses)) or 1.0  # the engine uses ranks; the size of the margin is irrelevant
        with _quiet():
            if self._engine._flgtelldone:
                # Two updates without an ask between them are refused by pycma: draw one and discard it.
                self._engine.ask(1)
            self._engine.tell([x for x, _ in batch], [worst + margin if f is None else f for _, f in batch])

    def _to_engine(self, point: Point) -> Point:
        """Point of the box -> unbounded coordinates of the free dimensions."""
        lower, upper = self._problem.lower[self._free], self._problem.upper[self._free]
        unit = np.clip((point[self._free] - lower) / (upper - lower), 0.0, 1.0)
        return np.array(self._transform.inverse(unit))

    def _to_box(self, drawn: Point) -> Point:
        """Unbounded coordinates -> point of the box; fixed dimensions keep their only value."""
        lower, upper = self._problem.lower[self._free], self._problem.upper[self._free]
        unit = np.array(self._transform.transform(drawn[: self._free.size]))
        point = self._problem.lower.copy()
        point[self._free] = np.clip(lower + (upper - lower) * unit, lower, upper)
        return point


def default_population(dim: int) -> int:
    """``4 + 3 ln d`` (Hansen 2016, eq. 48), at least 32 above 256 dimensions."""
    population = 4 + int(3 * math.log(max(dim, 1)))
    return max(population, WIDE_POPULATION) if dim > WIDE_LIMIT else population


def _quiet() -> warnings.catch_warnings[None]:
    """Silence pycma's advice (flat fitness, options), which users of a study cannot act on."""
    return warnings.catch_warnings(action="ignore")
