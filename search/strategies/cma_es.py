"""CMA-ES that waits for no generation, restarts, and grows its population with the noise.

A search in four steps: a problem, a strategy, what it asks, what it is told::

    problem = Problem(-np.ones(3), np.ones(3), start=np.zeros(3), objectives=1, budget=600,
                      scale=np.array([[0.0, 1.0]]), weights=np.ones(1))
    strategy = CmaEs(problem, seed=0)
    for suggestion in (strategy.ask(1)[0] for _ in range(problem.budget)):
        loss = np.sum((suggestion.point - 0.25) ** 2)
        strategy.tell([TrialResult(suggestion.id, suggestion.point, np.array([loss]))])
    print(strategy.best()[0])  # within 1e-3 of 0.25 in every coordinate

Hansen 2016, "The CMA Evolution Strategy: A Tutorial" (arXiv 1604.00772), engine: pycma. What we
add:

* No generation barrier. Every ask draws one sample from the current distribution; when a
  population's worth of results is in, whatever their age, the distribution is updated. Stragglers
  never block a worker.
* Restarts (Auger and Hansen 2005, "A Restart CMA Evolution Strategy With Increasing Population
  Size"): a run that has converged is followed by one with twice the population, which starts near
  the best known point. Results of the old run that arrive later are ignored.
* Noise (Hellwig and Beyer 2016, "Evolution under Strong Noise: A Self-Adaptive Evolution Strategy
  Can Reach the Lower Performance Bound - the pcCMSA-ES"): where the losses of a run have stopped
  falling before it has converged, noise decides the ranking, and the population grows; sooner where
  standard errors explain much of how losses differ. The distribution stays as it is.
  Re-evaluations would show nothing: the same merge on the same items has the same loss, and what
  misleads is the choice of the items. Unlike the paper we compare ranks, not values, and never
  shrink the population again.
* Fidelity: a loss with a larger standard error than others of its batch is pulled towards their
  mean by as much as it is less certain, so an estimate from few items is neither the best nor the
  worst of them by chance. What the errors of a batch have in common changes no ranking: on fixed
  items it is shared.
* Failed trials enter the update ranked below the worst result of their batch.
* Results of others enter if they are better than the batch: one at most for each update, pulled to
  where the distribution could have drawn them (Hansen 2011, "Injecting External Solutions Into
  CMA-ES", arXiv 1110.4181).
* Several objectives are combined by the problem's weights, scaled by the range of the anchors.
* ``best`` recommends the distribution mean, which under noise beats the luckiest trial, averaged
  over the latest updates among which the losses have not fallen (Polyak and Juditsky 1992,
  "Acceleration of Stochastic Approximation by Averaging").
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
from mergesearch.search.strategies.parts.noise import (
    TREND,
    fall,
    noise_share,
    pooled,
    settled,
    squared_error,
)
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.strategies.parts.unit_box import UnitBox

#: Full covariance up to this dimension, separable above (update cost grows with its square).
FULL_LIMIT = 200
#: Above this dimension, and under noise, a larger population pays: less noise in each step.
WIDE_LIMIT = 256
WIDE_POPULATION = 32
#: Updates among which the losses must fall, else noise decides; half of them are compared with the
#: other half.
WINDOW = 16
#: The same where known standard errors explain so large a share of the variance of a batch.
NOISY_WINDOW = 8
NOISE_SHARE = 0.1
#: The population grows only while so many updates of the new size are left in the budget.
LEAST_UPDATES = 10
#: A restart begins with steps twice as wide as the first run's, up to this fraction of the range.
RESTART_SIGMA = 0.3

Losses = npt.NDArray[np.float64]
#: YAML reads ``off`` as false.
Noise = Annotated[
    Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)
]


class Run:
    """One CMA-ES run: its distribution, and the results since the last update.

    Args:
        engine: The distribution.
        number: Restarts before this run.

    Attributes:
        batch: Sample and result of each trial since the last update.
        guest: Score, sample and losses of the best result of others since then.
        levels: Median loss of each batch.
    """

    def __init__(self, engine: Engine, number: int) -> None:
        self.engine = engine
        self.number = number
        self.batch: list[tuple[Point, TrialResult]] = []
        self.guest: tuple[float, Point, Losses] | None = None
        self.levels: list[float] = []
        self._means: list[Point] = []  # mean of the distribution after each batch
        self._spreads: list[float] = []  # its spread
        self._shares: list[float] = []  # share of noise in the variance of each batch
        self._resized = 0  # updates before the population last changed

    @property
    def standing(self) -> list[tuple[float, Point]]:
        """Level and mean of the updates among which the losses have not fallen.

        Empty before the first update.
        """
        if not self.levels:
            return []
        count = settled(self.levels)
        return [(float(np.median(self.levels[-count:])), np.mean(self._means[-count:], axis=0))]

    def update(self, score: Callable[[Losses], float]) -> bool:
        """Adapt the distribution to the batch; False where there are only failures in it."""
        samples = [sample for sample, _ in self.batch]
        results = [result for _, result in self.batch]
        self.batch = []
        plain = np.array([math.inf if r.losses is None else score(r.losses) for r in results])
        if plain.min() == math.inf:
            return False  # no ranking to learn from
        squares = np.array([squared_error(result, score) for result in results])
        scores = list(pooled(plain, squares))
        level = float(np.median(scores))
        if self.guest is not None and (guest_score := score(self.guest[2])) < level:
            samples = [*samples, self.guest[1]]
            scores = [*scores, guest_score]
        self.guest = None
        self.engine.update(samples, _ranked(scores))
        self.levels.append(level)
        self._shares.append(noise_share(plain, squares))
        self._means.append(self.engine.mean)
        self._spreads.append(self.engine.spread)
        return True

    def grow(self) -> None:
        """Go on with a larger population from the same distribution."""
        self.engine = self.engine.enlarged(_grown(self.engine.population))
        self._resized = len(self.levels)

    def stalled(self, trials_left: int) -> bool:
        """Whether the losses have stopped falling, with budget left for a larger population."""
        noisy = bool(self._shares) and np.mean(self._shares[-NOISY_WINDOW:]) >= NOISE_SHARE
        window = NOISY_WINDOW if noisy else WINDOW
        if len(self.levels) - self._resized < window:
            return False
        if trials_left < LEAST_UPDATES * _grown(self.engine.population):
            return False
        # A distribution that widens meets worse losses while it still makes progress.
        widens = self._spreads[-1] > self._spreads[-window]
        return not widens and fall(self.levels[-window:]) < TREND


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
        self._budget = problem.budget
        self._left = problem.budget
        self._box = UnitBox(problem)
        self._rng = np.random.default_rng(seed)
        self._restarts = restarts
        self._noise = noise
        self._sigma = sigma or (0.15 if self._box.dim <= 100 else 0.1)
        self._separable = covariance == "separable" or (
            covariance == "auto" and self._box.dim > FULL_LIMIT
        )
        # Tickets: number of the run, and the sample in unbounded coordinates.
        self._book = SuggestionBook[tuple[int, Point]]()
        # Level and mean of the best distribution that was given up.
        self._finished: list[tuple[float, Point]] = []
        self._run: Run | None = None
        if self._box.dim:
            engine = Engine(
                self._box.to_unit(problem.start),
                self._sigma,
                population or default_population(self._box.dim),
                self._separable,
                self._rng,
                None if scale is None else scale[self._box.free],
            )
            self._run = Run(engine, 0)

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` samples of the current distribution."""
        return [self._suggest() for _ in range(count)]

    def _suggest(self) -> Suggestion:
        if self._run is None:
            return self._book.issue(self._start)
        sample = self._run.engine.draw()
        point = self._box.to_point(self._run.engine.unit_of(sample))
        return self._book.issue(point, (self._run.number, sample))

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Collect results; update the distribution when a population's worth is in."""
        for trial in trials:
            ticket = self._book.redeem(trial)
            run = self._run
            if run is None or trial.evaluated is not None:
                continue
            if ticket is None:
                self._receive(trial, run)
            elif ticket[0] == run.number:
                run.batch.append((self._sample_of(trial, ticket[1], run.engine), trial))
            self._left -= ticket is not None
            if len(run.batch) >= run.engine.population and run.update(self._score):
                self._restart_or_grow(run)

    def best(self) -> list[Point]:
        """The mean of this run's distribution, or of an earlier run's whose level is lower."""
        if self._run is None:
            return []
        means = [*self._run.standing, *self._finished]
        _, mean = min(means, key=_level_of, default=(math.inf, self._run.engine.mean))
        return [self._box.to_point(mean)]

    def set_budget(self, budget: int) -> None:
        """Let the population grow while enough of another budget is left."""
        self._left += budget - self._budget
        self._budget = budget

    @property
    def level(self) -> float:
        """Median loss of the batches behind what ``best`` recommends; infinite before the first."""
        standing = [] if self._run is None else self._run.standing
        return min((level for level, _ in [*standing, *self._finished]), default=math.inf)

    def _sample_of(self, trial: TrialResult, drawn: Point, engine: Engine) -> Point:
        """The engine's sample behind a result; a point that was not drawn here is mapped back."""
        if np.allclose(self._box.to_point(engine.unit_of(drawn)), trial.point, rtol=0, atol=1e-9):
            return drawn
        return engine.sample_at(self._box.to_unit(trial.point))

    def _receive(self, trial: TrialResult, run: Run) -> None:
        """Keep the best result of others until the next update."""
        if trial.losses is None:
            return
        score = self._score(trial.losses)
        if run.guest is None or score < run.guest[0]:
            run.guest = score, run.engine.sample_at(self._box.to_unit(trial.point)), trial.losses

    def _restart_or_grow(self, run: Run) -> None:
        """Begin anew after a run that has converged; enlarge the population where noise rules."""
        if self._restarts and run.engine.stopped:
            # Keep the mean if it is the best so far: what follows is worse at first.
            self._finished = [min([*run.standing, *self._finished], key=_level_of)]
            self._restart(run)
        elif self._noise == "auto" and run.stalled(self._left):
            run.grow()

    def _restart(self, run: Run) -> None:
        """Begin a run with twice the population near the best known mean."""
        best = self._finished[0][1]
        spread = self._sigma * self._rng.standard_normal(best.size)
        start = np.clip(best + spread, 0.0, 1.0)
        wide = max(self._sigma, min(2 * self._sigma, RESTART_SIGMA))
        population = 2 * run.engine.population
        engine = Engine(start, wide, population, self._separable, self._rng)
        self._run = Run(engine, run.number + 1)


def _level_of(mean: tuple[float, Point]) -> float:
    return mean[0]


def default_population(dim: int) -> int:
    """``4 + 3 ln d`` (Hansen 2016, eq. 48), at least 32 above 256 dimensions."""
    population = 4 + int(3 * math.log(max(dim, 1)))
    return max(population, WIDE_POPULATION) if dim > WIDE_LIMIT else population


def _grown(population: int) -> int:
    """Twice the population, and no less than what noise calls for."""
    return max(2 * population, WIDE_POPULATION)


def _ranked(scores: Sequence[float]) -> list[float]:
    """Scores in which failures, which are infinite, lie just below the worst result.

    The engine uses ranks alone, so the size of the margin is irrelevant.
    """
    finite = [score for score in scores if score < math.inf]
    worst = max(finite) + ((max(finite) - min(finite)) or 1.0)
    return [worst if score == math.inf else score for score in scores]
