"""What the strategies of the MAP family share: results, their models, and the next points.

Li 2024, "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation"
(arXiv 2406.07529).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.search.front import nondominated
from mergesearch.search.strategies.base import Point, Problem, TrialResult
from mergesearch.search.strategies.parts.map_front import (
    PredictedFront,
    choose,
    predict,
    predict_front,
)
from mergesearch.search.strategies.parts.map_ridge import Array
from mergesearch.search.strategies.parts.map_surrogate import Model, fit_models
from mergesearch.search.strategies.parts.sampling import reflect
from mergesearch.search.strategies.parts.trust_region import certain_ones

#: A point this share of the front's range behind the front counts half as much for the models.
NEAR = 0.3
#: Steps of exploration, relative to how far the points near the front are spread.
EXPLORE_STEP = 0.5
#: The worse the models, the more is explored: this times the relative error, up to one half of all
#: points.
EXPLORE_GAIN = 6.0
#: Results that a model is fitted to at most where there are more unknowns; the nearest to the front
#: are kept.
MOST_RESULTS = 640
#: Dimension up to which a model has fewer unknowns than that.
SMALL = 16
#: Points from one fit: at least so many, and one for so many results.
BATCH = 8
RESULTS_PER_POINT = 16


@dataclass(frozen=True, eq=False)
class Box:
    """The free coordinates of a problem's box, scaled to the unit cube ``(free,)``."""

    lower: Point
    width: Point
    free: npt.NDArray[np.intp]

    @classmethod
    def of(cls, problem: Problem) -> Box:
        """The box of a problem, without coordinates whose bounds coincide."""
        return cls(problem.lower, problem.width, np.flatnonzero(problem.upper > problem.lower))

    def unit(self, points: Array) -> Array:
        """Points ``(..., dim)`` to the unit cube ``(..., free)``."""
        free = self.free
        return np.asarray(
            np.clip((points[..., free] - self.lower[free]) / self.width[free], 0.0, 1.0)
        )

    def point(self, unit: Array) -> Point:
        """Inverse of :meth:`unit` for one point."""
        point = self.lower.copy()
        upper = self.lower[self.free] + self.width[self.free]
        point[self.free] = np.minimum(
            self.lower[self.free] + self.width[self.free] * np.clip(unit, 0.0, 1.0), upper
        )
        return point


def nearness(losses: Array) -> Array:
    """How near rows ``(n, objectives)`` lie to their own front, ``(n,)``.

    1 on the front, 1/2 at ``NEAR`` of its range behind it: 1 / (1 + (distance / NEAR)²).
    """
    front = losses[nondominated(losses)]
    size = np.ptp(front, axis=0)
    if size.max() <= 0:
        size = losses.std(axis=0)
    size = np.where(size > 1e-9 * size.max(), size, max(float(size.max()), 1e-300))
    behind = np.full(len(losses), np.inf)
    for row in front:
        behind = np.minimum(behind, np.max((losses - row) / size, axis=1))
    return np.asarray(1.0 / (1.0 + (np.maximum(behind, 0.0) / NEAR) ** 2))


class FrontSearch:
    """Remembers results, fits models to them, and proposes points on and near the front.

    Args:
        problem: The box and the objectives; its anchors are results.
        rng: Generator of the strategy.
        explore: Largest share of points around the front instead of on it.
        batch: Points from one fit; default 8, or one for 16 results.
        polish: Gauss-Newton steps after the closed-form fit of bounded objectives.
    """

    def __init__(
        self,
        problem: Problem,
        rng: np.random.Generator,
        *,
        explore: float = 0.5,
        batch: int | None = None,
        polish: bool = True,
    ) -> None:
        self.box = Box.of(problem)
        self._problem = problem
        self._rng = rng
        self._explore = explore
        self._batch = batch
        self._polish = polish
        self._points: list[Array] = []
        self._losses: list[Array] = []
        self._errors: list[Array] = []  # standard errors, NaN where unknown
        self._failed: list[Array] = []
        self._queue: list[Array] = []
        self._debt = 0.0  # explorations that are due
        self._fitted: tuple[int, tuple[Model, ...], Array] | None = None
        for anchor in problem.anchors:
            self.tell(anchor)

    def tell(self, trial: TrialResult) -> None:
        """Remember a result; one on fewer items is ignored."""
        if trial.evaluated is not None:
            return
        unit = self.box.unit(trial.point)
        if trial.losses is None or not np.all(np.isfinite(trial.losses)):
            self._failed.append(unit)
            return
        self._points.append(unit)
        self._losses.append(np.asarray(trial.losses, dtype=np.float64))
        unknown = np.full(self._problem.objectives, np.nan)
        self._errors.append(unknown if trial.errors is None else np.asarray(trial.errors))

    @property
    def results(self) -> int:
        """Number of results with losses."""
        return len(self._points)

    @property
    def points(self) -> Array:
        """Measured points in the unit cube ``(n, free)``, in the order of results."""
        return np.array(self._points)

    def models(self) -> tuple[Model, ...]:
        """Models of what is known, fitted again when there are more results."""
        if self._fitted is None or self._fitted[0] != self.results:
            self._fitted = (self.results, *self._fit())
        return self._fitted[1]

    def _fit(self) -> tuple[tuple[Model, ...], Array]:
        points = self.points
        losses = np.array(self._losses)
        squares = np.array(self._errors) ** 2
        certainty = np.stack([certain_ones(column) for column in squares.T], axis=1)
        near = nearness(self._problem.normalise(losses))
        if len(points) > MOST_RESULTS and points.shape[1] > SMALL:
            keep = np.sort(np.argsort(-near, kind="stable")[:MOST_RESULTS])
            points = points[keep]
            losses = losses[keep]
            certainty = certainty[keep]
            near = near[keep]
        signs = np.ones(losses.shape[1]) if self._problem.signs is None else self._problem.signs
        models = fit_models(
            points, losses, signs, importance=near, certainty=certainty, polish=self._polish
        )
        # standard deviation of each coordinate, weighted by nearness
        spread = np.sqrt(
            np.maximum(near @ points**2 / near.sum() - (near @ points / near.sum()) ** 2, 0.0)
        )
        return models, spread

    def propose(self, pending: Sequence[Point]) -> Array:
        """The next point in the unit cube, given the points whose results are outstanding."""
        if not self._queue:
            self._queue = self._next_batch([self.box.unit(point) for point in pending])
        return self._queue.pop(0)

    def front(self, shift: Array | None = None) -> PredictedFront:
        """The front that is predicted now."""
        shift = np.full(self._problem.objectives, 0.5) if shift is None else shift
        return predict_front(self.models(), self.points, shift)

    def query(self, preference: Sequence[float] | Array) -> Point:
        """The point of the predicted front with the best weighted sum of normalised losses."""
        front = self.front()
        scores = self._problem.normalise(front.losses) @ np.asarray(preference, dtype=np.float64)
        return self.box.point(front.points[int(np.argmin(scores))])

    def _next_batch(self, pending: list[Array]) -> list[Array]:
        """Points of the front by the volume that they add, and points around the front."""
        count = self._batch or max(BATCH, self.results // RESULTS_PER_POINT)
        models = self.models()
        front = self.front(self._rng.random(self._problem.objectives))
        known = np.array([*self._points, *self._failed, *pending])
        normalise = self._problem.normalise
        chosen = choose(normalise(front.losses), normalise(predict(models, known)), count)
        share = min(self._explore, 0.05 + EXPLORE_GAIN * self._relative_error(models))
        batch: list[Array] = []
        for _ in range(count):
            self._debt += share
            if self._debt < 1.0 and chosen:
                batch.append(front.points[chosen.pop(0)])
            else:
                self._debt = max(self._debt - 1.0, 0.0)
                batch.append(self._around(front.points[int(self._rng.integers(len(front.points)))]))
        return batch

    def _around(self, point: Array) -> Array:
        assert self._fitted is not None
        step = EXPLORE_STEP * self._fitted[2] * self._rng.standard_normal(point.size)
        return reflect(point + step, np.zeros_like(point), np.ones_like(point))

    def _relative_error(self, models: Sequence[Model]) -> float:
        """Largest error of a model, relative to how much its losses vary near the front."""
        losses = np.array(self._losses)
        near = nearness(self._problem.normalise(losses))
        mean = near @ losses / near.sum()
        spread = np.sqrt(near @ (losses - mean) ** 2 / near.sum())
        ratios = [m.error / s for m, s in zip(models, spread.tolist(), strict=True) if s > 0]
        return max(ratios, default=math.inf)
