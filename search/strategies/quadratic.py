"""A quadratic model in a trust region proposes beside CMA-ES, while it predicts.

Powell 2006, "The NEWUOA software for unconstrained optimization without derivatives", gave the
idea: near the base the losses of a merge are nearly quadratic in its coefficients, and a quadratic
knows its minimum. His interpolation cannot bear noise, so the model is a ridge regression
(``quadratic_model``), and its evidence and its leave-one-out error govern it:

* Model and CMA-ES take turns while the results are evidence for the model, against a constant;
  before, all turns are those of CMA-ES, which learns from every result, those of the model as
  injected solutions. The evidence does not fade near the optimum, where a leave-one-out error sees
  nothing but noise.
* How much the loss varies along each coordinate is learned too, in parts that the coefficients of
  an expert share, and those of a block (``coordinate_scales``).
* The trust region is a box around the lowest predicted point among the results. Results far outside
  it, losses far above the best ones, and results with large standard errors weigh less. Each new
  fit tries a region that is larger or smaller, in turn, and keeps it if that predicts the results
  near the centre better when they are left out: on a true quadratic the region grows over the box,
  elsewhere it shrinks.
* The model proposes its minimum in the region, drawn in until the model is sure of its value there,
  plus a Gaussian whose spread in each direction raises the loss by about the noise: several
  outstanding proposals differ, and tell the model most about where the minimum lies.
* Where more results are outstanding than CMA-ES has in a population, its samples come back too late
  for the distribution that they were drawn from. At most half a population of them is then
  outstanding, the model takes the other turns, and a proposal is the one of several draws about
  which the model will know least when the results of those before it are in.
* ``best`` recommends that minimum, or the mean of CMA-ES while the model is not trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.cma_es import CmaEs, default_population
from mergesearch.search.strategies.parts.coordinate_scales import CoordinateScales
from mergesearch.search.strategies.parts.noise import squared_error
from mergesearch.search.strategies.parts.quadratic_model import Array, fit_quadratic
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.strategies.parts.trust_region import (
    Region,
    certain_ones,
    low_ones,
    make_region,
)
from mergesearch.search.strategies.parts.unit_box import UnitBox

#: Free coordinates above which the cost of an ask is too high.
MOST = 512
#: The model is trusted if its log evidence exceeds that of the mean alone by so much.
TRUSTED = 3.0
#: Results with which fits begin, beside one for every four coordinates, at most two for each.
LEAST = 30
#: Results that a fit takes at most, the nearest ones (cost grows with the cube).
NEAREST = 1000
#: A fit is repeated once the results have grown by this share.
REFIT = 0.05
#: Half-width of the region at first, its range, and the factor between two that are compared, as
#: fractions of the box.
REGION = 0.3
REGIONS = (0.01, 1.0)
STEP = 1.4
#: Outstanding results that cost nothing in any dimension.
FEW = 8
#: Outstanding proposals that a new one keeps apart from, at most, the latest ones.
PENDING = 64
#: Ticket of a suggestion that the model made; those of CMA-ES count from 0.
OF_THE_MODEL = -1


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
        self._scales = CoordinateScales(_names(problem, self._box.free), self._box.dim)
        self._units: list[Point] = []
        self._losses: list[float] = []
        self._squares: list[float] = []  # squared standard errors
        self._fitted = 0  # results at the last fit
        self._book = SuggestionBook[int]()  # tickets: ids at CMA-ES, or OF_THE_MODEL
        # Proposals of the model without a result: id -> unit cube.
        self._pending: dict[int, Point] = {}
        self._share = max(default_population(self._box.dim), FEW) // 2
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
        outstanding = len(self._book.outstanding)
        crowded = outstanding > 2 * self._share
        late = crowded and outstanding - len(self._pending) >= self._share
        self._turn = region is not None and (late or not self._turn)
        if region is not None and self._turn:
            return self._propose(region, apart=crowded)
        suggestion = self._cma.ask(1)[0]
        return self._book.relay(suggestion, suggestion.id)

    def _propose(self, region: Region, *, apart: bool) -> Suggestion:
        """A proposal of the model; ``apart`` from outstanding ones."""
        if apart and self._pending:
            latest = [*self._pending.values()][-PENDING:]
            unit = region.draw_apart(self._rng, np.array(latest))
        else:
            unit = region.draw(self._rng)
        suggestion = self._book.issue(self._box.to_point(unit), OF_THE_MODEL)
        self._pending[suggestion.id] = unit
        return suggestion

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Pass every result to CMA-ES, and fit the model again when there are enough new ones."""
        for trial in trials:
            ticket = self._book.redeem(trial)
            of_the_model = ticket == OF_THE_MODEL
            if of_the_model and trial.id is not None:
                del self._pending[trial.id]
            self._cma.tell([replace(trial, id=None if of_the_model else ticket)])
            if trial.losses is None and of_the_model:
                # The model led to where merges fail.
                self._half = max(self._half / STEP, REGIONS[0])
            self._learn(trial)
            if len(self._losses) - self._fitted >= max(1.0, REFIT * len(self._losses)):
                self._refit()

    def best(self) -> list[Point]:
        """The model's minimum if the model is trusted, else the mean of CMA-ES."""
        region = self._trusted()
        if region is None:
            return self._cma.best()
        return [self._box.to_point(region.to_unit(region.minimum))]

    def set_budget(self, budget: int) -> None:
        """Tell CMA-ES; the model needs no budget."""
        self._cma.set_budget(budget)

    def _trusted(self) -> Region | None:
        """The region, if the results are evidence for its model."""
        region = self._region
        return None if region is None or region.model.evidence < TRUSTED else region

    def _learn(self, trial: TrialResult) -> None:
        """Keep whole results; failures and partial results are no data."""
        if trial.losses is not None and trial.evaluated is None and self._box.dim:
            self._units.append(self._box.to_unit(trial.point))
            self._losses.append(self._score(trial.losses))
            self._squares.append(squared_error(trial, self._score))

    def _refit(self) -> None:
        """Fit in this region and in a larger or smaller one, and keep the better predictor."""
        self._fitted = len(self._losses)
        dim = self._box.dim
        if self._fitted < min(2 * dim + 4, LEAST + dim // 4):
            return
        units = np.array(self._units)
        losses = np.array(self._losses)
        self._centre = self._choose_centre(units, losses)
        distance = np.sqrt(np.mean((units - self._centre) ** 2, axis=1))
        near = np.argsort(distance, kind="stable")[:NEAREST]
        importance = low_ones(losses[near]) * certain_ones(np.array(self._squares)[near])
        self._factor = 1.0 / self._factor
        halves = self._half, float(np.clip(self._half * self._factor, *REGIONS))
        # w_i = importance_i / (1 + (distance_i / half)²)²
        weights = [importance / (1.0 + (distance[near] / half) ** 2) ** 2 for half in halves]
        offsets = (units - self._centre)[near]
        models = [
            fit_quadratic(offsets / half, losses[near], w, self._scales.scale)
            for half, w in zip(halves, weights, strict=True)
        ]
        errors = [
            np.inf if model is None else float(weights[0] @ model.residuals**2) for model in models
        ]
        best = int(np.argmin(errors))
        self._half = halves[best]
        model = models[best]
        self._region = None if model is None else make_region(self._centre, self._half, model)
        if model is not None and self._scales.learns:
            self._scales.follow(model.scale_gradient())

    def _choose_centre(self, units: Array, losses: Array) -> Point:
        """The result near the region with the lowest prediction, else the lowest loss."""
        region = self._trusted()
        if region is None:
            return (
                self._centre if self._region is not None else np.asarray(units[np.argmin(losses)])
            )
        inside = units[np.max(np.abs(units - region.centre), axis=1) <= 1.5 * region.half]
        return (
            np.asarray(inside[np.argmin(region.predict(inside))]) if len(inside) else self._centre
        )


def _names(problem: Problem, free: npt.NDArray[np.intp]) -> list[str]:
    """Names of the free coordinates; none where the space does not have those of the box."""
    names = () if problem.space is None else problem.space.names
    return [names[index] for index in free] if len(names) == problem.dim else []
