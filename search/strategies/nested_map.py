"""Nested MAP: merges pairs of models, each by a MAP of two coefficients, until one model is left.

Li 2024, "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation"
(arXiv 2406.07529), the variant for many tasks. A model is a point of the box, and a merge of two is
``c1 p1 + c2 p2``, clipped to the box: task vectors are linear in the coefficients. What we changed,
and where the paper leaves it open:

* The first models are the anchors that are best at some objective, each standing for the objectives
  that it is best at. Where that is one anchor for all of them, or there are none, the vertices of
  the box are the first models: one coordinate 1 and the others 0, or groups of coordinates where
  the budget is too short for so many pairs.
* The two objectives of a pair are what its sides stand for, weighted and in units of the anchors'
  range; a side that stands for nothing looks at all objectives.
* The chosen merge is measured, and the best of everything that the pair has measured goes on, so
  that a wrong prediction costs one trial and not the tournament.
* Nothing waits: while results of a pair are outstanding, it goes on proposing. When one model is
  left, all results serve a MAP of the whole box
  (:class:`mergesearch.search.strategies.parts.map_search.FrontSearch`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.map import MOST, Map
from mergesearch.search.strategies.parts.map_design import LEAST_RESULTS, corner, refuse_dimensions
from mergesearch.search.strategies.parts.map_ridge import Array
from mergesearch.search.strategies.parts.map_search import FrontSearch
from mergesearch.search.strategies.parts.sampling import sobol_points
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook

#: The design of a pair: this multiple of the six unknowns of a quadratic in two coefficients, and
#: this share of points.
PAIR_DESIGN = 2.0
PAIR_SHARE = 0.6


@dataclass(eq=False)
class Side:
    """A current model.

    Attributes:
        point: Position in the box ``(dim,)``.
        tasks: Objectives that it stands for.
        losses: As measured ``(objectives,)``; None before, and after a failure.
        waiting: Whether it must still be measured.
    """

    point: Point
    tasks: tuple[int, ...] = ()
    losses: Array | None = None
    waiting: bool = False


@dataclass(frozen=True, eq=False)
class Errand:
    """What a suggestion is for.

    Attributes:
        point: Where it is measured ``(dim,)``.
        side: The first model that it measures, if any.
        pair: The pair that asked for it, if any.
        number: The pair's own number of it.
    """

    point: Point
    side: Side | None = None
    pair: Pair | None = None
    number: int = 0


class NestedMap:
    """A tournament of pairs, then MAP.

    Args:
        problem: The box and the objectives.
        seed: Seed of the strategy's generator.
        points: Results of a pair before its merge is chosen.
        explore: Largest share of points around predicted fronts instead of on them.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        points: Annotated[int, Bound(ge=6)] = 20,
        explore: Annotated[float, Bound(ge=0, lt=1)] = 0.5,
    ) -> None:
        refuse_dimensions("nested_map", problem, MOST)
        self._problem = problem
        self._points = points
        self._explore = explore
        self._rng = np.random.default_rng(seed)
        self._search = FrontSearch(problem, self._rng, explore=explore)
        self._fill = sobol_points(self._search.box.unit(problem.start), self._rng, 0.2)
        self._sides = first_sides(problem, points)
        self._unasked = [side for side in self._sides if side.waiting]
        self._pair: Pair | None = None
        self._book = SuggestionBook[Errand]()

    def ask(self, count: int) -> list[Suggestion]:
        """Unmeasured first models, then points of the current pair, then of the whole front."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Remember results, and pass them to the pair that asked."""
        for trial in trials:
            self._search.tell(trial)
            errand = self._book.redeem(trial)
            if errand is None:
                continue
            if errand.side is not None:
                errand.side.losses = trial.losses
                errand.side.waiting = False
            if errand.pair is not None:
                errand.pair.tell(errand.number, trial)

    def best(self) -> list[Point]:
        """The predicted compromise at the study's weights, once the tournament is over."""
        over = self._pair is None and len(self._sides) < 2 and self._search.results >= LEAST_RESULTS
        return [self._search.query(self._problem.weights)] if over else []

    def _suggest(self) -> Suggestion:
        errand = self._next()
        return self._book.issue(errand.point, errand)

    def _next(self) -> Errand:
        box = self._search.box
        if not box.free.size:
            return Errand(self._problem.lower.copy())
        if self._unasked:
            side = self._unasked.pop(0)
            return Errand(side.point, side=side)
        if any(side.waiting for side in self._sides):
            return Errand(box.point(next(self._fill)))
        self._advance()
        if self._pair is not None:
            number, point = self._pair.ask()
            return Errand(point, pair=self._pair, number=number)
        if self._search.results < LEAST_RESULTS:
            return Errand(box.point(next(self._fill)))
        pending = [errand.point for errand in self._book.outstanding]
        return Errand(box.point(self._search.propose(pending)))

    def _advance(self) -> None:
        """End a pair that is done, and begin the next one."""
        if self._pair is not None and self._pair.merged is not None:
            self._sides.append(self._pair.merged)
            self._pair = None
        if self._pair is None and len(self._sides) > 1:
            share_tasks(self._sides, self._problem.objectives)
            left, right = closest(self._sides, self._problem)
            self._sides = [side for side in self._sides if side is not left and side is not right]
            self._pair = Pair(
                self._problem,
                left,
                right,
                self._points,
                self._explore,
                int(self._rng.integers(2**32)),
            )


def first_sides(problem: Problem, points: int) -> list[Side]:
    """The anchors that are best at an objective, or vertices where there are not two of these."""
    measured = [anchor for anchor in problem.anchors if anchor.losses is not None]
    sides: dict[bytes, Side] = {}
    for task in range(problem.objectives if measured else 0):
        best = min(
            measured,
            key=lambda anchor: anchor.losses[task] if anchor.losses is not None else math.inf,
        )
        side = sides.setdefault(best.point.tobytes(), Side(best.point, losses=best.losses))
        side.tasks = (*side.tasks, task)
    return list(sides.values()) if len(sides) > 1 else _corner_sides(problem, measured, points)


def _corner_sides(problem: Problem, anchors: Sequence[TrialResult], points: int) -> list[Side]:
    """Vertices, in as many groups as half of the budget has pairs for.

    Those that anchors have measured are known.
    """
    free = np.flatnonzero(problem.width)
    count = min(free.size, max(2, problem.budget // (2 * points)))
    sides = []
    for group in np.array_split(free, count) if count else []:
        point = corner(problem, group)
        known = [
            anchor.losses
            for anchor in anchors
            if np.allclose(anchor.point, point, rtol=0, atol=1e-9)
        ]
        sides.append(Side(point, losses=known[0] if known else None, waiting=not known))
    return sides


def share_tasks(sides: Sequence[Side], objectives: int) -> None:
    """Give every objective that no model stands for to the model that is best at it."""
    measured = [side for side in sides if side.losses is not None]
    taken = {task for side in sides for task in side.tasks}
    for task in range(objectives if measured else 0):
        if task not in taken:
            best = min(
                measured,
                key=lambda side: side.losses[task] if side.losses is not None else math.inf,
            )
            best.tasks = (*best.tasks, task)


def closest(sides: Sequence[Side], problem: Problem) -> tuple[Side, Side]:
    """The two models with the closest scalarised losses; failures are far from all others."""
    scores = [math.inf if side.losses is None else problem.scalarise(side.losses) for side in sides]

    def distance(pair: tuple[int, int]) -> float:
        first, second = (scores[index] for index in pair)
        return 0.0 if first == second else abs(first - second)

    left, right = min(itertools.combinations(range(len(sides)), 2), key=distance)
    return sides[left], sides[right]


class Pair:
    """A MAP of the two coefficients of a merge.

    Args:
        problem: The whole problem.
        left, right: What is merged.
        points: Results before the merge is chosen.
        explore: As in the strategy.
        seed: Of the MAP.

    Attributes:
        merged: The model that goes on; None until the chosen merge has a result.
    """

    def __init__(
        self, problem: Problem, left: Side, right: Side, points: int, explore: float, seed: int
    ) -> None:
        self.merged: Side | None = None
        self._problem = problem
        self._sides = (left, right)
        self._points = points
        self._tasks = (*left.tasks, *right.tasks)
        self._weights = np.zeros(
            (2, problem.objectives)
        )  # of the objectives that each side stands for
        for row, side in zip(self._weights, self._sides, strict=True):
            row[list(side.tasks)] = problem.weights[list(side.tasks)]
        self._results = [
            (side.point, side.losses) for side in self._sides if side.losses is not None
        ]
        self._plane = self._make_plane()
        self._map = Map(self._plane, seed, design=PAIR_DESIGN, share=PAIR_SHARE, explore=explore)
        self._outstanding: dict[int, Point] = {}
        self._told = 0
        self._chosen = False

    def _make_plane(self) -> Problem:
        """The problem in the two coefficients, its objectives being what the sides stand for."""
        corners = zip(np.eye(2), self._sides, strict=True)
        anchors = [
            TrialResult(None, c, self._side_losses(side.losses))
            for c, side in corners
            if side.losses is not None
        ]
        shares = self._weights.sum(axis=1)
        return Problem(
            lower=np.zeros(2),
            upper=np.ones(2),
            start=np.full(2, 0.5),
            objectives=2,
            budget=self._points,
            scale=np.array([[0.0, 1.0], [0.0, 1.0]]),
            weights=shares / shares.sum() if shares.any() else np.full(2, 0.5),
            anchors=tuple(anchors),
        )

    def _side_losses(self, losses: Array) -> Array:
        """Mean normalised loss of the objectives of each side ``(2,)``, from ``(objectives,)``."""
        weights = np.where(
            self._weights.any(axis=1, keepdims=True), self._weights, self._problem.weights
        )
        return np.asarray(weights @ self._problem.normalise(losses) / weights.sum(axis=1))

    def _scalarise(self, losses: Array) -> float:
        """The result's weighted loss over all objectives that the pair stands for."""
        weights = self._weights.sum(axis=0)
        weights = weights if weights.any() else self._problem.weights
        return float(weights @ self._problem.normalise(losses))

    def ask(self) -> tuple[int, Point]:
        """The pair's number of the next point, -1 for the chosen merge, and the point itself."""
        if self._told >= self._points and not self._chosen:
            self._chosen = True
            number = -1
            c = self._map.query(self._plane.weights)
        else:
            suggestion = self._map.ask(1)[0]
            number = suggestion.id
            c = suggestion.point
        self._outstanding[number] = c
        # c_1 p_1 + c_2 p_2
        merged = c[0] * self._sides[0].point + c[1] * self._sides[1].point
        return number, np.clip(merged, self._problem.lower, self._problem.upper)

    def tell(self, number: int, trial: TrialResult) -> None:
        """Learn from a result; that of the chosen merge ends the pair."""
        self._told += 1
        c = self._outstanding.pop(number)
        losses = None
        if trial.losses is not None:
            self._results.append((trial.point, trial.losses))
            losses = self._side_losses(trial.losses)
        self._map.tell([TrialResult(number, c, losses)])
        if number == -1:
            self.merged = self._best()

    def _best(self) -> Side:
        """The best of all measured points, the two sides among them."""
        if not self._results:
            return Side(self._sides[0].point, self._tasks)
        point, losses = min(self._results, key=lambda result: self._scalarise(result[1]))
        return Side(point, self._tasks, losses)
