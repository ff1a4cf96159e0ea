"""MAP: quadratic models of all objectives from a design, then the front that they predict, verified point by point.

Li 2024, "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation" (arXiv 2406.07529).
What we changed:

* The design is scrambled Sobol points, most of them around the start and a quarter over the whole box, instead of a
  random part of a regular grid. Anchors are results already and are not asked for again.
* The models and how they are chosen: see :mod:`search.strategies.map_model`. The search of their front, by weighted
  sums instead of NSGA-III and never beyond the samples: see :mod:`search.strategies.map_front`.
* Predicted points are measured, the models are fitted again, and so on until the budget ends. The worse the models
  predict, the more points are taken around the predicted front instead of on it, which also lets the region grow.
* Nothing waits: points whose results are outstanding count as known, with what the models predict of them.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field as Bound

from merging import InputError
from search.strategies.map_ridge import Array
from search.strategies.map_search import FrontSearch
from search.strategies.random import reflect
from search.strategy import Point, Problem, Suggestion, Told

#: Above this dimension too few results would have to say too much.
MOST = 256
#: Up to this dimension the vertices (one coordinate 1, the others 0) are part of the design.
VERTEX_LIMIT = 16
#: Results with which models begin.
LEAST_RESULTS = 3


class Map:
    """Design, surrogate front, verification.

    Args:
        problem: The box and the objectives.
        seed: Seed of the strategy's generator.
        design: Points of the design, as a multiple of the ``(d + 1)(d + 2) / 2`` unknowns of a quadratic.
        share: The design takes at most this share of the budget.
        sigma: Spread of the design around the start, as a fraction of the range.
        explore: Largest share of later points around the predicted front instead of on it.
        batch: Points from one fit of the models; default 8, or one for 16 results where that is more.
        polish: Follow the closed-form fit of bounded objectives by steps of nonlinear least squares.
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
        self._left = design_size(problem, design, share)
        self._pending: dict[int, Point] = {}
        self._asked = 0

    def ask(self, count: int) -> list[Suggestion]:
        """Points of the design, then of the predicted front."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[Told]) -> None:
        """Remember results; the models are fitted when they are needed."""
        for trial in trials:
            if trial.id is not None:
                self._pending.pop(trial.id, None)
            self._search.tell(trial)

    def best(self) -> list[Point]:
        """The predicted compromise at the study's weights."""
        return [self.query(self._problem.weights)] if self._search.results >= LEAST_RESULTS else []

    def query(self, preference: Sequence[float] | Array) -> Point:
        """The point of the predicted front for a preference.

        Args:
            preference: Importance of each objective ``(objectives,)``, at least 0; only ratios matter.

        Returns:
            The point with the smallest preference-weighted sum of predicted losses, each in units of the anchors'
            range, ``(dim,)``; the start while nothing is known.
        """
        return self._search.query(preference) if self._search.results else self._problem.start

    def _suggest(self) -> Suggestion:
        point = self._search.box.point(self._next())
        suggestion = Suggestion(self._asked, point)
        self._pending[self._asked] = point
        self._asked += 1
        return suggestion

    def _next(self) -> Array:
        if not self._search.box.free.size:
            return np.empty(0)
        if self._left > 0 or self._search.results < LEAST_RESULTS:
            self._left -= 1
            return next(self._design)
        return self._search.propose(list(self._pending.values()))


def refuse_dimensions(name: str, problem: Problem, most: int) -> None:
    """Refuse boxes with more coordinates than a strategy can model.

    Raises:
        InputError: If there are more than ``most``.
    """
    if problem.dim > most:
        raise InputError(
            f"strategy.name: expected at most {most} coordinates for {name}, received {problem.dim}; choose a coarser "
            "space, or nsga2 or cma_parego"
        )


def design_size(problem: Problem, multiple: float, share: float) -> int:
    """Points of a design: ``multiple`` of the unknowns, less the anchors, within a share of the budget."""
    dim = int(np.count_nonzero(problem.width))
    unknowns = (dim + 1) * (dim + 2) // 2
    wanted = int(np.ceil(multiple * unknowns)) - len(problem.anchors)
    return max(min(wanted, int(share * problem.budget)), LEAST_RESULTS)


def design_points(problem: Problem, search: FrontSearch, rng: np.random.Generator, sigma: float) -> Iterator[Array]:
    """The start and the vertices, then Sobol points without end, in the unit cube."""
    yield from first_points(problem, search)
    yield from sobol_points(search.box.unit(problem.start), rng, sigma)


def first_points(problem: Problem, search: FrontSearch) -> list[Array]:
    """The start and, in few dimensions, the vertices, in the unit cube, as far as no anchor measured them."""
    few = search.box.free.size <= VERTEX_LIMIT
    points: list[Array] = []
    for point in (problem.start, *(vertices(problem) if few else ())):
        unit = search.box.unit(point)
        if not any(np.allclose(unit, other, rtol=0, atol=1e-9) for other in (*search.points, *points)):
            points.append(unit)
    return points


def vertices(problem: Problem) -> list[Point]:
    """A corner for each free coordinate: the experts of a task-wise merge."""
    return [corner(problem, [place]) for place in np.flatnonzero(problem.width)]


def corner(problem: Problem, ones: npt.ArrayLike) -> Point:
    """Some coordinates 1 and the others 0, or as near to that as the box allows."""
    low, high = (np.clip(value, problem.lower, problem.upper) for value in (0.0, 1.0))
    return np.asarray(np.where(np.isin(np.arange(problem.dim), ones), high, low))


def sobol_points(start: Array, rng: np.random.Generator, sigma: float) -> Iterator[Array]:
    """Scrambled Sobol points of the unit cube: every fourth as it is, the others normal around the start."""
    from scipy.special import ndtri
    from scipy.stats import qmc

    sobol = qmc.Sobol(start.size, scramble=True, rng=rng)
    for place in itertools.count():
        with warnings.catch_warnings():
            # Points come one at a time; the balance that scipy warns about holds at powers of two.
            warnings.simplefilter("ignore", UserWarning)
            uniform = np.clip(sobol.random(1)[0], 1e-12, 1.0 - 1e-12)
        if place % 4 == 1:
            yield uniform
        else:
            yield reflect(start + sigma * ndtri(uniform), np.zeros_like(start), np.ones_like(start))
