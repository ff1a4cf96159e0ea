"""CMA-ES, full and separable, asynchronous, with restarts and a population that grows with the
noise.

Hansen 2016, "The CMA Evolution Strategy: A Tutorial" (arXiv 1604.00772), engine: pycma. What we
add:

* No generation barrier. Every ask draws one sample from the current distribution; when a
  population's worth of results is in, whatever their age, the distribution is updated. Stragglers
  never block a worker.
* Restarts (Auger and Hansen 2005, "A Restart CMA Evolution Strategy With Increasing Population
  Size"): a run that has converged is followed by one with twice the population, which starts near
  the best place known. Results of the old run that arrive later are passed over.
* Noise (Hellwig and Beyer 2016, "Evolution under Strong Noise: A Self-Adaptive Evolution Strategy
  Can Reach the Lower Performance Bound - the pcCMSA-ES"): where the losses of a run have stopped
  falling before it has converged, noise decides the ranking, and the population grows.
  Re-evaluations would show nothing: the same merge on the same items has the same loss, and what
  misleads is the choice of the items. Unlike the paper we compare ranks, not values, and never
  shrink the population again.
* Failed trials enter the update ranked below the worst result of their batch.
* Results of others enter if they are better than the batch: one at most for each update, pulled to
  where the distribution could have drawn them (Hansen 2011, "Injecting External Solutions Into
  CMA-ES", arXiv 1110.4181).
* Several objectives are combined by the problem's weights, scaled by the range of the anchors.
* ``best`` recommends the distribution mean, which under noise beats the luckiest trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.cma_engine import Engine
from mergesearch.search.strategies.parts.unit_box import UnitBox

#: Full covariance up to this dimension, separable above (update cost grows with its square).
FULL_LIMIT = 200
#: Above this dimension, and under noise, a larger population pays: less noise in each step.
WIDE_LIMIT = 256
WIDE_POPULATION = 32
#: Updates among which the losses must fall, else noise decides; half of them are compared with the
#: other half.
WINDOW = 16
#: How far the newer half must lie below the older, in standard deviations of the rank-sum
#: statistic.
TREND = 1.0
#: The population grows only while so many updates of the new size are left in the budget.
LEAST_UPDATES = 10
#: How much wider the distribution becomes when the population grows.
WIDEN = 3.0
#: A restart begins with steps twice as wide as the first run's, up to this fraction of the range.
RESTART_SIGMA = 0.3

Losses = npt.NDArray[np.float64]
#: YAML reads ``off`` as false.
Noise = Annotated[
    Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)
]


class CmaEs:
    """Asynchronous CMA-ES.

    Args:
        problem: The box and how losses combine.
        seed: Seed of the strategy's generator.
        score: Losses ``(objectives,)`` to the number that is minimised; default: the problem's
            weighted sum.
        scale: First steps of the coordinates relative to ``sigma`` ``(dim,)``; default: all the
            same.
        sigma: First step size as a fraction of the range; default 0.15, and 0.1 above 100
            dimensions.
        population: Results per update; default ``4 + 3 ln d``, at least 32 above 256 dimensions.
        covariance: ``full``, ``separable`` (diagonal), or ``auto``: full up to 200 dimensions.
        restarts: Whether to begin anew, with twice the population, once a run has converged.
        noise: ``auto``: the population grows where noise decides; ``off``: it does not.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        score: Callable[[Losses], float] | None = None,
        scale: Point | None = None,
        *,
        sigma: Annotated[float, Bound(gt=0, le=1)] | None = None,
        population: Annotated[int, Bound(ge=4)] | None = None,
        covariance: Literal["auto", "full", "separable"] = "auto",
        restarts: bool = True,
        noise: Noise = "auto",
    ) -> None:
        self._score = score or problem.scalarise
        self._start = problem.start
        self._left = problem.budget
        self._box = UnitBox(problem)
        self._rng = np.random.default_rng(seed)
        self._restarts = restarts
        self._noise = noise
        self._sigma = sigma or (0.15 if self._box.dim <= 100 else 0.1)
        self._separable = covariance == "separable" or (
            covariance == "auto" and self._box.dim > FULL_LIMIT
        )
        self._asked = 0
        self._drawn: dict[
            int, tuple[int, Point]
        ] = {}  # suggestion -> its run, and the unbounded sample
        self._run = 0
        self._finished: list[
            tuple[float, Point]
        ] = []  # level and mean of the best distribution that was given up
        self._engine: Engine | None = None
        if self._box.dim:
            start = self._box.to_unit(problem.start)
            count = population or default_population(self._box.dim)
            self._begin(start, self._sigma, count, None if scale is None else scale[self._box.free])

    def _begin(
        self, start: Point, sigma: float, population: int, scale: Point | None = None
    ) -> None:
        self._engine = Engine(start, sigma, population, self._separable, self._rng, scale)
        self._batch: list[tuple[Point, Losses | None]] = []  # results since the last update
        self._guest: tuple[float, Point, Losses] | None = (
            None  # the best result of others since then
        )
        self._levels: list[
            float
        ] = []  # median loss of each batch since the population last changed
        self._spreads: list[float] = []  # spread after each of them

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` samples of the current distribution."""
        return [self._suggest() for _ in range(count)]

    def _suggest(self) -> Suggestion:
        point = self._start
        if self._engine is not None:
            sample = self._engine.draw()
            self._drawn[self._asked] = self._run, sample
            point = self._box.to_point(self._engine.unit_of(sample))
        self._asked += 1
        return Suggestion(self._asked - 1, point)

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Collect results; update the distribution when a population's worth is in."""
        for trial in trials:
            own = None if trial.id is None else self._drawn.pop(trial.id, None)
            if self._engine is None or trial.evaluated is not None:
                continue
            if own is None:
                self._receive(trial, self._engine)
            elif own[0] == self._run:
                self._batch.append((self._sample_of(trial, own[1], self._engine), trial.losses))
            self._left -= own is not None
            if len(self._batch) == self._engine.population:
                self._update(self._engine)

    def best(self) -> list[Point]:
        """The mean of the current distribution, or of an earlier run's where that found better
        losses.
        """
        return [] if self._engine is None else [self._box.to_point(self._best_unit(self._engine))]

    @property
    def level(self) -> float:
        """Median loss of the batch behind what ``best`` recommends; infinite before the first."""
        standing = [] if self._engine is None else self._standing(self._engine)
        return min((level for level, _ in [*standing, *self._finished]), default=math.inf)

    def _best_unit(self, engine: Engine) -> Point:
        return min(
            [*self._standing(engine), *self._finished],
            key=lambda it: it[0],
            default=(0.0, engine.mean),
        )[1]

    def _standing(self, engine: Engine) -> list[tuple[float, Point]]:
        """Median loss of the latest batch, and the mean, once there is a batch."""
        return [(self._levels[-1], engine.mean)] if self._levels else []

    def _shelve(self, engine: Engine) -> None:
        """Keep the mean if it is the best so far: what follows is worse at first."""
        self._finished = [min([*self._standing(engine), *self._finished], key=lambda it: it[0])]

    def _sample_of(self, trial: TrialResult, drawn: Point, engine: Engine) -> Point:
        """The engine's sample behind a told point; a point that was not drawn here is mapped
        back.
        """
        if np.allclose(self._box.to_point(engine.unit_of(drawn)), trial.point, rtol=0, atol=1e-9):
            return drawn
        return engine.sample_at(self._box.to_unit(trial.point))

    def _receive(self, trial: TrialResult, engine: Engine) -> None:
        """Keep the best result of others until the next update."""
        if trial.losses is None:
            return
        score = self._score(trial.losses)
        if self._guest is None or score < self._guest[0]:
            self._guest = score, engine.sample_at(self._box.to_unit(trial.point)), trial.losses

    def _update(self, engine: Engine) -> None:
        batch = self._batch
        self._batch = []
        scores = [math.inf if losses is None else self._score(losses) for _, losses in batch]
        if min(scores) == math.inf:
            return  # nothing but failures: no ranking to learn from
        level = float(np.median(scores))
        if self._guest is not None and (score := self._score(self._guest[2])) < level:
            batch = [*batch, (self._guest[1], None)]
            scores = [*scores, score]
        self._guest = None
        engine.update([sample for sample, _ in batch], _ranked(scores))
        self._levels.append(level)
        self._spreads.append(engine.spread)
        if self._restarts and engine.stopped:
            self._restart(engine)
        elif self._noise == "auto" and self._stalled(engine):
            self._grow(engine)

    def _restart(self, engine: Engine) -> None:
        """A new run with twice the population, near the best place known; the old run's results are
        passed over.
        """
        self._shelve(engine)
        best = self._finished[0][1]
        self._run += 1
        spread = self._sigma * self._rng.standard_normal(best.size)
        wide = max(self._sigma, min(2 * self._sigma, RESTART_SIGMA))
        self._begin(np.clip(best + spread, 0.0, 1.0), wide, 2 * engine.population)

    def _stalled(self, engine: Engine) -> bool:
        """Whether the losses have stopped falling, with enough budget left to do something about
        it.
        """
        if len(self._levels) < WINDOW or self._left < LEAST_UPDATES * _grown(engine.population):
            return False
        # A distribution that widens meets worse losses while it still makes progress.
        widens = self._spreads[-1] > self._spreads[-WINDOW]
        return not widens and fall(self._levels[-WINDOW:]) < TREND

    def _grow(self, engine: Engine) -> None:
        """The same distribution, wider and with a larger population."""
        self._shelve(engine)
        self._engine = engine.enlarged(_grown(engine.population), WIDEN)
        self._levels = []
        self._spreads = []


def default_population(dim: int) -> int:
    """``4 + 3 ln d`` (Hansen 2016, eq. 48), at least 32 above 256 dimensions."""
    population = 4 + int(3 * math.log(max(dim, 1)))
    return max(population, WIDE_POPULATION) if dim > WIDE_LIMIT else population


def fall(levels: Sequence[float]) -> float:
    """How far the newer half of ``levels`` lies below the older: rank-sum statistic in standard
    deviations.

    Mann and Whitney 1947, "On a Test of Whether one of Two Random Variables is Stochastically
    Larger than the Other".
    """
    half = len(levels) // 2
    older = np.array(levels[:half])[:, None]
    newer = np.array(levels[-half:])
    wins = np.sum(newer < older) + 0.5 * np.sum(newer == older)
    return float((wins - half**2 / 2) / math.sqrt(half**2 * (2 * half + 1) / 12))


def _grown(population: int) -> int:
    """Twice the population, and no less than what noise calls for."""
    return max(2 * population, WIDE_POPULATION)


def _ranked(scores: Sequence[float]) -> list[float]:
    """Scores with failures (infinite) just below the worst; the engine uses ranks, the margin's
    size is irrelevant.
    """
    finite = [score for score in scores if score < math.inf]
    worst = max(finite) + ((max(finite) - min(finite)) or 1.0)
    return [worst if score == math.inf else score for score in scores]
