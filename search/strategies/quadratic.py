"""A quadratic model in a trust region proposes beside CMA-ES, while it predicts well.

Powell 2006, "The NEWUOA software for unconstrained optimization without derivatives", gave the
idea: near the base the losses of a merge are nearly quadratic in its coefficients, and a quadratic
knows its minimum. His interpolation cannot bear noise, so the model is a ridge regression
(``quadratic_model``), and what governs it is its leave-one-out error:

* Model and CMA-ES take turns while the model predicts better than the mean does; otherwise all
  turns are those of CMA-ES, which learns from every result, those of the model as injected
  solutions. With many coordinates and few results the model is of low rank and rarely trusted: then
  this is CMA-ES.
* The trust region is a box around the lowest predicted point among the results. Results far outside
  it, and losses far above the best ones, weigh less. Each new fit tries a region that is larger or
  smaller, in turn, and keeps it if that predicts the results near the centre better: on a true
  quadratic the region grows over the box, elsewhere it shrinks.
* The model proposes its minimum in the region, drawn in until the model is sure of its value there,
  plus a Gaussian whose spread in each direction raises the loss by about the noise: several
  outstanding proposals differ, and tell the model most about where the minimum lies.
* ``best`` recommends the model's minimum if the model is as sure of it as of a measurement, or sure
  that it is better than the mean of CMA-ES; else that mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.cma_es import CmaEs
from mergesearch.search.strategies.parts.quadratic_model import (
    Array,
    QuadraticModel,
    descend,
    fit_quadratic,
)
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.strategies.parts.unit_box import UnitBox

#: Free coordinates above which a model of few results is no use.
MOST = 256
#: The model predicts if its leave-one-out error is below this share of the mean's.
PREDICTS = 0.9
#: Results that a fit takes at most, the nearest ones (cost grows with the cube).
NEAREST = 400
#: A fit is repeated once the results have grown by this share.
REFIT = 0.05
#: Half-width of the region at first, its range, and the factor between two that are compared, as
#: fractions of the box.
REGION = 0.3
REGIONS = (0.01, 1.0)
STEP = 1.4
#: Losses so many times as far above the best tenth as the median is count half.
TALL = 2.0
#: The model is sure of its minimum if its standard deviation there is at most so many times the
#: noise,
SURE = 2.0
#: or at most this share of what it gains over the centre.
GAIN = 0.25
#: Ticket of a suggestion that the model made; those of CMA-ES count from 0.
OF_THE_MODEL = -1
#: The part of the region that the model is sure of is not made smaller than this.
LEAST_REACH = 0.02


@dataclass(frozen=True, eq=False)
class Region:
    """A trust region, a box in the unit cube, and the model in it.

    The model's coordinates are ``(unit - centre) / half``.

    Attributes:
        centre: Unit cube ``(dim,)``.
        half: Half-width.
        model: Fitted in the region.
        lower, upper: The part that the model is sure of, in its coordinates ``(dim,)``.
        minimum: The model's, in that part ``(dim,)``.
        axes: Directions of the curvature, in columns ``(dim, dim)``.
        bends: Curvature along each of them ``(dim,)``.
    """

    centre: Point
    half: float
    model: QuadraticModel
    lower: Array
    upper: Array
    minimum: Array
    axes: Array
    bends: Array

    def draw(self, rng: np.random.Generator) -> Point:
        """A point of the unit cube around the minimum ``(dim,)``."""
        rise = rng.random() * self.model.noise
        limit = 0.25 * float(np.max(self.upper - self.lower))
        spread = np.minimum(np.sqrt(2 * rise / np.maximum(self.bends, 1e-12)), limit)
        point = self.minimum + self.axes @ (spread * rng.standard_normal(spread.size))
        return self.to_unit(np.clip(point, self.lower, self.upper))

    def predict(self, unit: Point) -> float:
        """Loss at a point of the unit cube."""
        return float(self.model.predict((unit - self.centre) / self.half))

    def to_unit(self, point: Array) -> Point:
        """Coordinates of the model -> unit cube."""
        return np.clip(self.centre + self.half * point, 0.0, 1.0)


class Quadratic:
    """A quadratic trust-region model beside CMA-ES."""

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(self, problem: Problem, seed: int) -> None:
        self._box = UnitBox(problem)
        if self._box.dim > MOST:
            raise InputError(
                f"strategy.name: quadratic expected at most {MOST} coordinates, received "
                f"{self._box.dim}; choose cma_es"
            )
        self._score = problem.scalarise
        self._rng = np.random.default_rng(seed)
        self._cma = CmaEs(problem, int(self._rng.integers(2**32)))
        self._units: list[Point] = []
        self._losses: list[float] = []
        self._fitted = 0  # results at the last fit
        self._book = SuggestionBook[int]()  # tickets: ids at CMA-ES, or OF_THE_MODEL
        self._turn = False
        self._centre = self._box.to_unit(problem.start)
        self._half = REGION
        self._factor = STEP
        self._region: Region | None = None
        for anchor in problem.anchors:
            self._learn(anchor)
        self._refit()

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` suggestions of the model and of CMA-ES in turn.

        All are of CMA-ES while the model does not predict.
        """
        return [self._suggest() for _ in range(count)]

    def _suggest(self) -> Suggestion:
        region = self._trusted()
        self._turn = region is not None and not self._turn
        if region is not None and self._turn:
            return self._book.issue(self._box.to_point(region.draw(self._rng)), OF_THE_MODEL)
        suggestion = self._cma.ask(1)[0]
        return self._book.relay(suggestion, suggestion.id)

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Pass every result to CMA-ES, and fit the model again when there are enough new ones."""
        for trial in trials:
            ticket = self._book.redeem(trial)
            of_the_model = ticket == OF_THE_MODEL
            self._cma.tell([replace(trial, id=None if of_the_model else ticket)])
            if trial.losses is None and of_the_model:
                # The model led to where merges fail.
                self._half = max(self._half / STEP, REGIONS[0])
            self._learn(trial)
            if len(self._losses) - self._fitted >= max(1.0, REFIT * len(self._losses)):
                self._refit()

    def best(self) -> list[Point]:
        """The model's minimum if it is as good as measured, else the mean of CMA-ES."""
        region = self._trusted()
        others = self._cma.best()
        if region is None:
            return others
        gain = region.predict(self._box.to_unit(others[0])) - float(
            region.model.predict(region.minimum)
        )
        if region.model.deviation(region.minimum) > max(region.model.noise, GAIN * gain):
            return others
        return [self._box.to_point(region.to_unit(region.minimum))]

    def _trusted(self) -> Region | None:
        """The region, if its model predicts."""
        return (
            self._region
            if self._region is not None and self._region.model.error < PREDICTS
            else None
        )

    def _learn(self, trial: TrialResult) -> None:
        """Keep whole results; failures and partial results are no data."""
        if trial.losses is not None and trial.evaluated is None and self._box.dim:
            self._units.append(self._box.to_unit(trial.point))
            self._losses.append(self._score(trial.losses))

    def _refit(self) -> None:
        """Fit in this region and in a larger or smaller one, and keep the better predictor."""
        self._fitted = len(self._losses)
        if self._fitted < 2 * self._box.dim + 4:
            return
        units = np.array(self._units)
        losses = np.array(self._losses)
        self._centre = self._choose_centre(units, losses)
        distance = np.sqrt(np.mean((units - self._centre) ** 2, axis=1))
        near = np.argsort(distance, kind="stable")[:NEAREST]
        offsets = (units - self._centre)[near]
        losses = losses[near]
        distance = distance[near]
        importance = _low_ones(losses)
        self._factor = 1.0 / self._factor
        halves = self._half, float(np.clip(self._half * self._factor, *REGIONS))
        # w_i = importance_i / (1 + (distance_i / half)²)²
        weights = [importance / (1.0 + (distance / half) ** 2) ** 2 for half in halves]
        models = [
            fit_quadratic(offsets / half, losses, w)
            for half, w in zip(halves, weights, strict=True)
        ]
        errors = [
            np.inf if model is None else float(weights[0] @ model.residuals**2) for model in models
        ]
        best = int(np.argmin(errors))
        self._half = halves[best]
        model = models[best]
        self._region = None if model is None else make_region(self._centre, self._half, model)

    def _choose_centre(self, units: Array, losses: Array) -> Point:
        """The result near the region with the lowest prediction, else the lowest loss."""
        region = self._trusted()
        if region is None:
            return (
                self._centre if self._region is not None else np.asarray(units[np.argmin(losses)])
            )
        inside = units[np.max(np.abs(units - region.centre), axis=1) <= 1.5 * region.half]
        if not len(inside):
            return self._centre
        return np.asarray(
            inside[np.argmin(region.model.predict((inside - region.centre) / region.half))]
        )


def _low_ones(losses: Array) -> Array:
    """Weight of each loss ``(n,)``: about 1 near the best tenth, small far above the median."""
    low, middle = np.quantile(losses, [0.1, 0.5])
    scale = TALL * (middle - low) or float(np.std(losses)) or 1.0
    return np.asarray(1.0 / (1.0 + (np.maximum(losses - low, 0.0) / scale) ** 2))


def make_region(centre: Point, half: float, model: QuadraticModel) -> Region:
    """The part of the box around ``centre`` in which the model is sure of its minimum."""
    bends, axes = np.linalg.eigh(model.curvature)
    step = 1.0 / max(float(np.max(np.abs(bends))), 1e-12)
    reach = 1.0
    while True:
        lower = np.maximum(-reach, -centre / half)
        upper = np.minimum(reach, (1.0 - centre) / half)
        minimum = descend(model.slope, model.curvature, step, lower, upper)
        gain = model.value - float(model.predict(minimum))
        if reach < LEAST_REACH or model.deviation(minimum) < max(SURE * model.noise, GAIN * gain):
            return Region(centre, half, model, lower, upper, minimum, axes, bends)
        reach *= 0.7
