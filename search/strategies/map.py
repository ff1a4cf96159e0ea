"""MAP: quadratic models of all objectives, and measurements of the front that they predict.

Li 2024, "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation"
(arXiv 2406.07529). What we changed:

* The design is scrambled Sobol points, most of them around the start and a quarter over the whole
  box, instead of a random part of a regular grid. Anchors are results already and are not asked for
  again.
* The models and how they are chosen: see :mod:`mergesearch.search.strategies.parts.map_surrogate`.
  The search of their front, by weighted sums instead of NSGA-III and never beyond the samples: see
  :mod:`mergesearch.search.strategies.parts.map_front`.
* Predicted points are measured, the models are fitted again, and so on until the budget ends. The
  worse the models predict, the more points are taken around the predicted front instead of on it,
  which also lets the region grow.
* Nothing waits: points whose results are outstanding count as known, with what the models predict
  of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.map_design import (
    LEAST_RESULTS,
    design_points,
    design_size,
    refuse_dimensions,
)
from mergesearch.search.strategies.parts.map_ridge import Array
from mergesearch.search.strategies.parts.map_search import FrontSearch
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook

#: Above this dimension too few results would have to say too much.
MOST = 256


class Map:
    """A design, models of its results, and measurements of the front that they predict.

    Args:
        problem: The box and the objectives.
        seed: Seed of the strategy's generator.
        design: Points of the design, as a multiple of the ``(d + 1)(d + 2) / 2`` unknowns of a
            quadratic.
        share: The design takes at most this share of the budget.
        sigma: Spread of the design around the start, as a fraction of the range.
        explore: Largest share of later points around the predicted front instead of on it.
        batch: Points from one fit of the models; default 8, or one for 16 results where that is
            more.
        polish: Follow the closed-form fit of bounded objectives by steps of nonlinear least
            squares.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        design: Annotated[float, Bound(gt=0)] = 1.0,
        share: Annotated[float, Bound(gt=0, lt=1)] = 0.25,
        sigma: Annotated[float, Bound(gt=0, le=1)] = 0.2,
        explore: Annotated[float, Bound(ge=0, lt=1)] = 0.5,
        batch: Annotated[int, Bound(ge=1)] | None = None,
        polish: bool = True,
    ) -> None:
        refuse_dimensions("map", problem, MOST)
        self._problem = problem
        self._rng = np.random.default_rng(seed)
        self._search = FrontSearch(problem, self._rng, explore=explore, batch=batch, polish=polish)
        self._design = design_points(problem, self._search, self._rng, sigma)
        self._design_size = partial(design_size, multiple=design, share=share)
        self._left = self._design_size(problem)
        self._book = SuggestionBook[Point]()  # tickets: the points themselves

    def ask(self, count: int) -> list[Suggestion]:
        """Points of the design, then of the predicted front."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Remember results; the models are fitted when they are needed."""
        for trial in trials:
            self._book.redeem(trial)
            self._search.tell(trial)

    def best(self) -> list[Point]:
        """The predicted compromise at the study's weights."""
        return [self.query(self._problem.weights)] if self._search.results >= LEAST_RESULTS else []

    def set_budget(self, budget: int) -> None:
        """Give the design its share of another budget, unless it is over."""
        before = self._design_size(self._problem)
        self._problem = replace(self._problem, budget=budget)
        if self._left > 0:
            self._left += self._design_size(self._problem) - before

    def query(self, preference: Sequence[float] | Array) -> Point:
        """The point of the predicted front for a preference.

        Args:
            preference: Importance of each objective ``(objectives,)``, at least 0; only ratios
                matter.

        Returns:
            The point with the smallest preference-weighted sum of predicted losses, each in units
            of the anchors' range, ``(dim,)``; the start while nothing is known.
        """
        return self._search.query(preference) if self._search.results else self._problem.start

    def _suggest(self) -> Suggestion:
        point = self._search.box.point(self._next())
        return self._book.issue(point, point)

    def _next(self) -> Array:
        if not self._search.box.free.size:
            return np.empty(0)
        if self._left > 0 or self._search.results < LEAST_RESULTS:
            self._left -= 1
            return next(self._design)
        return self._search.propose(self._book.outstanding)
