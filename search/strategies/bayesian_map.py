"""Bayesian MAP: a design where each objective's model errs most, then the predicted front.

Li 2024, "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation"
(arXiv 2406.07529), the variant with adaptive sampling. Points are rays from the base: angles, cut
into bins, and a radius. What we changed:

* A bin without points counts as the worst bin. (With a score of minus infinity it would
  never be explored.)
* Each of the subsamples behind a bin's spread drops its own fifth of the points. (One mask for all
  of them, shrunk again and again, would leave nothing.)
* Errors are those of points left out of the fit, relative to the worst bin, so that the temperature
  has no unit.
* Every result serves all objectives, so these do not keep designs of their own; each chooses its
  share of a round.
* The origin is the point of zero coefficients, or what in the box is nearest to it; radii are
  shares of the way from there to the face of the box, which in more than two dimensions is longer
  than 1.
* No round is waited for: the next one is planned from the results that are there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.map_design import (
    LEAST_RESULTS,
    first_points,
    refuse_dimensions,
)
from mergesearch.search.strategies.parts.map_ridge import Array
from mergesearch.search.strategies.parts.map_search import FrontSearch
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook

#: Largest number of coordinates: bins grow exponentially with it.
MOST = 8
#: Bins per angle with few coordinates, and with many.
FINE = 4
COARSE = 2
#: Fewer coordinates than this get the fine bins.
FEW = 4
#: Subsamples behind the spread of a bin's error, and the share of its points that each drops.
SUBSAMPLES = 30
DROPPED = 0.2
#: Radii as shares of the way to the face of the box.
RADII = (0.2, 0.8)


class BayesianMap:
    """A design along rays where the models err, then the predicted front.

    Args:
        problem: The box and the objectives.
        seed: Seed of the strategy's generator.
        initial: Points before the first model; default: the vertices, and one for every unknown of
            a linear model.
        rounds: Rounds of the design, the initial points being the first.
        share: Share of the budget that the design takes.
        temperature: Of the choice among bins; small: the worst bins only.
        explore: Largest share of later points around the predicted front instead of on it.
        batch: Points from one fit of the models in the front's phase; default as in ``map``.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        initial: Annotated[int, Bound(ge=1)] | None = None,
        rounds: Annotated[int, Bound(ge=2)] = 4,
        share: Annotated[float, Bound(gt=0, lt=1)] = 0.5,
        temperature: Annotated[float, Bound(gt=0)] = 0.07,
        explore: Annotated[float, Bound(ge=0, lt=1)] = 0.5,
        batch: Annotated[int, Bound(ge=1)] | None = None,
    ) -> None:
        refuse_dimensions("bayesian_map", problem, MOST)
        self._problem = problem
        self._rng = np.random.default_rng(seed)
        self._search = FrontSearch(problem, self._rng, explore=explore, batch=batch)
        self._rays = Rays.of(problem, self._search)
        self._temperature = temperature
        dim = self._search.box.free.size
        self._initial = self._initial_points(2 * dim + 1 if initial is None else initial)
        self._share = share
        self._rounds = rounds
        self._design = self._later_points(problem.budget)
        self._round = -(-self._design // (rounds - 1))
        self._later = self._design  # points of later rounds that are left
        self._queue = list(self._initial)
        self._book = SuggestionBook[Point]()  # tickets: the points themselves

    def _initial_points(self, count: int) -> list[Array]:
        """The start and the vertices that no anchor measured, then rays.

        Rays go through the bins in turn.
        """
        if not self._search.box.free.size:
            return []
        first = first_points(self._problem, self._search)
        order = itertools.cycle(self._rng.permutation(self._rays.bins).tolist())
        rays = (self._rays.sample(number, self._rng) for number in order)
        return list(itertools.islice(itertools.chain(first, rays), count))

    def _later_points(self, budget: int) -> int:
        """Points of all rounds but the first."""
        return max(int(self._share * budget) - len(self._initial), 0)

    def set_budget(self, budget: int) -> None:
        """Give the design its share of another budget, unless it is over."""
        before = self._design
        self._design = self._later_points(budget)
        if self._later > 0:
            self._later += self._design - before
            self._round = -(-self._design // (self._rounds - 1))

    def ask(self, count: int) -> list[Suggestion]:
        """Points of the rounds, then of the predicted front."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Remember results; models are fitted when a round is planned."""
        for trial in trials:
            self._book.redeem(trial)
            self._search.tell(trial)

    def best(self) -> list[Point]:
        """The predicted compromise at the study's weights."""
        return [self.query(self._problem.weights)] if self._search.results >= LEAST_RESULTS else []

    def query(self, preference: Sequence[float] | Array) -> Point:
        """The point of the predicted front for a preference ``(objectives,)``, as in ``map``."""
        return self._search.query(preference) if self._search.results else self._problem.start

    def _suggest(self) -> Suggestion:
        point = self._search.box.point(self._next())
        return self._book.issue(point, point)

    def _next(self) -> Array:
        if not self._search.box.free.size:
            return np.empty(0)
        if not self._queue and (self._later > 0 or self._search.results < LEAST_RESULTS):
            self._queue = self._plan()
        return self._queue.pop(0) if self._queue else self._search.propose(self._book.outstanding)

    def _plan(self) -> list[Array]:
        """Points of the next round: every objective chooses bins by its own errors, in turn."""
        count = max(min(self._round, self._later), 1)
        self._later -= count
        if self._search.results < LEAST_RESULTS:
            chances = [np.full(self._rays.bins, 1.0 / self._rays.bins)]
        else:
            bins = self._rays.bins_of(self._search.points)
            chances = [self._chances(model.left_out**2, bins) for model in self._search.models()]
        turns = itertools.islice(itertools.cycle(chances), count)
        return [
            self._rays.sample(int(self._rng.choice(self._rays.bins, p=chance)), self._rng)
            for chance in turns
        ]

    def _chances(self, squares: Array, bins: npt.NDArray[np.intp]) -> Array:
        """Probability of each bin: a softmax of the bins' scores ``(bins,)``.

        Args:
            squares: Squared errors ``(n,)``.
            bins: The bin of each of their points ``(n,)``.
        """
        # p_b ∝ exp(score_b / temperature)
        scores = bin_scores(squares, bins, self._rays.bins, self._rng)
        weights = np.exp((scores - scores.max()) / self._temperature)
        return np.asarray(weights / weights.sum())


class Rays:
    """Rays from an origin: bins of hyperspherical angles in the positive orthant, and a radius.

    Args:
        origin: Where rays begin ``(dim,)``.
        reach: From the origin to the farther face, signed ``(dim,)``.
    """

    def __init__(self, origin: Array, reach: Array) -> None:
        self._origin = origin
        self._reach = reach
        self._angles = max(origin.size - 1, 0)
        self._per_angle = FINE if origin.size < FEW else COARSE
        self.bins: int = self._per_angle**self._angles

    @classmethod
    def of(cls, problem: Problem, search: FrontSearch) -> Rays:
        """Rays from the point nearest to zero coefficients into the larger part of the box."""
        origin = search.box.unit(np.clip(0.0, problem.lower, problem.upper))
        return cls(origin, np.where(origin <= 0.5, 1.0 - origin, -origin))

    def bins_of(self, points: Array) -> npt.NDArray[np.intp]:
        """Bins ``(n,)`` of points ``(n, dim)``; the origin itself lies in the first."""
        angles = to_angles(np.maximum((points - self._origin) / self._reach, 0.0))
        digits = np.minimum(
            (angles / (0.5 * np.pi) * self._per_angle).astype(np.intp), self._per_angle - 1
        )
        return np.asarray(digits @ self._per_angle ** np.arange(self._angles), dtype=np.intp)

    def sample(self, number: int, rng: np.random.Generator) -> Array:
        """A point whose angles are uniform in a bin, and whose radius is uniform in ``RADII``."""
        digits = number // self._per_angle ** np.arange(self._angles) % self._per_angle
        angles = (digits + rng.random(self._angles)) / self._per_angle * (0.5 * np.pi)
        direction = to_direction(angles)
        # Where the ray leaves the box, its largest coordinate is 1.
        radius = rng.uniform(*RADII) / direction.max()
        return np.asarray(np.clip(self._origin + radius * direction * self._reach, 0.0, 1.0))


def to_direction(angles: Array) -> Array:
    """Angles ``(dim - 1,)`` to the unit vector ``(dim,)``.

    x_1 = cos a_1, x_i = sin a_1 … sin a_{i−1} cos a_i, x_d = sin a_1 … sin a_{d−1}.
    """
    sines = np.concatenate([[1.0], np.cumprod(np.sin(angles))])
    return np.asarray(sines * np.concatenate([np.cos(angles), [1.0]]))


def to_angles(directions: Array) -> Array:
    """Vectors ``(n, dim)`` without negative entries to angles ``(n, dim - 1)`` in [0, π/2]."""
    tails = np.sqrt(np.cumsum(directions[:, ::-1] ** 2, axis=1))[:, ::-1]
    return np.arctan2(tails[:, 1:], directions[:, :-1])


def bin_scores(
    squares: Array, bins: npt.NDArray[np.intp], count: int, rng: np.random.Generator
) -> Array:
    """Score of each bin ``(count,)``: mean squared error plus half its spread over subsamples.

    Scores are in units of the worst bin's.

    Args:
        squares: Squared errors ``(n,)``.
        bins: The bin of each point ``(n,)``.
        count: Number of bins; those without points score like the worst.
        rng: Chooses the subsamples.
    """
    scores = np.full(count, np.nan)
    for number in np.unique(bins):
        own = squares[bins == number]
        kept = max(own.size - int(DROPPED * own.size), 1)
        means = [float(np.mean(rng.choice(own, kept, replace=False))) for _ in range(SUBSAMPLES)]
        # mean e² + ½ std over the subsamples
        scores[number] = own.mean() + 0.5 * np.std(means)
    worst = np.nanmax(scores, initial=0.0)
    return np.asarray(
        np.where(np.isnan(scores), 1.0, scores / worst) if worst > 0 else np.ones(count)
    )
