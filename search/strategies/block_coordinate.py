"""Block coordinate descent from the top of the network downwards.

A search of all coordinates finds a region, then the coefficients of one window of blocks after
another are refined, with all others held: the last quarter of the blocks first, then the quarter
below it, and again from the top. Tseng 2001, "Convergence of a block coordinate descent method for
nondifferentiable minimization" (Journal of Optimization Theory and Applications 109): a sweep never
gets worse, and ends where no window alone can improve. What we chose:

* The order. Blocks below a window have the weights of the trial before, so workers keep what these
  gave for each item and do not run them again (``workers.hidden_states_gb``); the upper a window,
  the less there is to run. Results are the same bits.
* Windows are searched as any problem is: by the quadratic surrogate where the trials are at least
  as many as the coordinates, by CMA-ES otherwise. A window begins at the best merge that is known,
  and knows all results that lie in it.
* No window waits for outstanding results; those that come late count for theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field as Bound

from mergesearch.merging import InputError
from mergesearch.merging.tensors.roles import block_axes, depth_in, roles_of
from mergesearch.search.strategies.auto import choose
from mergesearch.search.strategies.base import (
    Point,
    Problem,
    Strategy,
    Suggestion,
    TrialResult,
    tell_budget,
)
from mergesearch.search.strategies.cma_es import CmaEs
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.strategies.quadratic import Quadratic
from mergesearch.spaces import BoxSpace, CoefficientSpace, Space

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

#: Half-width of the box of a window around the best known merge, as a fraction of the whole one.
HALF = 0.25
#: Trials of a window at least, so that a small budget refines the upper windows alone.
LEAST = 8


@dataclass(frozen=True, eq=False)
class Window:
    """The box of some coordinates, with all others held.

    Attributes:
        whole: The problem that it is part of.
        indices: The coordinates.
        centre: What the others are, and where the window begins ``(dim,)``.
        half: Half-width of the box, as a fraction of the whole one.
    """

    whole: Problem
    indices: Indices
    centre: Point
    half: float

    def problem(self, budget: int, results: Sequence[TrialResult]) -> Problem:
        """The problem in the window; known results that lie in it are its anchors."""
        lower, upper = self._bounds()
        anchors = [
            replace(result, id=None, point=point)
            for result in results
            if (point := self.inside(result.point)) is not None
        ]
        everything = self.indices.size == self.whole.dim
        return replace(
            self.whole,
            lower=lower,
            upper=upper,
            start=self.centre[self.indices],
            origin=self.centre[self.indices],
            budget=budget,
            anchors=tuple(anchors),
            space=self.whole.space if everything else None,
        )

    def outside(self, point: Point) -> Point:
        """The whole point ``(dim,)`` of one in the window; held coordinates keep their bits."""
        whole = self.centre.copy()
        whole[self.indices] = point
        return whole

    def inside(self, point: Point) -> Point | None:
        """The coordinates in the window of a whole point, or None where it holds others."""
        lower, upper = self._bounds()
        own = point[self.indices]
        held = np.array_equal(self.outside(own), point)
        return own if held and bool(np.all((own >= lower) & (own <= upper))) else None

    def _bounds(self) -> tuple[Point, Point]:
        reach = self.half * self.whole.width
        lower = np.maximum(self.whole.lower, self.centre - reach)
        upper = np.minimum(self.whole.upper, self.centre + reach)
        return lower[self.indices], upper[self.indices]


@dataclass(eq=False)
class _Stage:
    """The search of a window.

    Attributes:
        number: Of the window, from the top; -1 for all coordinates at once.
        window: The coordinates.
        strategy: Searches them.
        left: Suggestions until the next stage begins.
        told: Number of its own results.
    """

    number: int
    window: Window
    strategy: Strategy
    left: int
    told: int = field(default=0)


class BlockCoordinate:
    """Searches all coefficients, then those of one window of blocks after another from the top.

    Args:
        problem: The box.
        seed: Of the first search, and of the generator that seeds those of the windows.
        first: Share of the budget for all coordinates at once, before the windows.
        windows: Number of windows into which the blocks are divided.

    Raises:
        InputError: If the coefficients of the space do not differ with depth.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        first: Annotated[float, Bound(ge=0, lt=1)] = 0.5,
        windows: Annotated[int, Bound(ge=1)] = 4,
    ) -> None:
        self._problem = problem
        self._first = first
        self._rng = np.random.default_rng(seed)
        self._windows = windows_of(problem, windows)
        self._book = SuggestionBook[tuple[int, int]]()  # tickets: place of the stage, id there
        self._results = list(problem.anchors)
        self._stages: list[_Stage] = []
        if self._opening():
            everything = np.arange(problem.dim)
            self._begin(-1, Window(problem, everything, problem.start, 1.0), self._opening(), seed)
        else:
            self._next_window()

    def ask(self, count: int) -> list[Suggestion]:
        """Points of all coordinates first, later those of a window."""
        return [self._suggest() for _ in range(count)]

    def _suggest(self) -> Suggestion:
        stage = self._stages[-1]
        if stage.left <= 0:
            stage = self._next_window()
        stage.left -= 1
        own = stage.strategy.ask(1)[0]
        ticket = len(self._stages) - 1, own.id
        notes = {} if stage.number < 0 else {"window": float(stage.number)}
        return self._book.issue(stage.window.outside(own.point), ticket, notes=notes)

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Tell every stage whose window holds the point."""
        for trial in trials:
            ticket = self._book.redeem(trial)
            if trial.losses is not None and trial.evaluated is None:
                self._results.append(replace(trial, items={}, gradient_result=None))
            for place, stage in enumerate(self._stages):
                own = ticket is not None and ticket[0] == place
                if own or place == len(self._stages) - 1:
                    self._tell_stage(stage, trial, ticket[1] if own and ticket else None)

    def _tell_stage(self, stage: _Stage, trial: TrialResult, own: int | None) -> None:
        point = trial.point[stage.window.indices] if own is not None else None
        if point is None:
            point = stage.window.inside(trial.point)
        if point is not None:
            stage.told += own is not None
            stage.strategy.tell([replace(trial, id=own, point=point)])

    def best(self) -> list[Point]:
        """What the search of the latest window with results recommends."""
        for stage in reversed(self._stages):
            points = stage.strategy.best() if stage.told >= LEAST else []
            if points:
                return [stage.window.outside(points[0])]
        return []

    def set_budget(self, budget: int) -> None:
        """Plan the first stage, or the windows that are to come, by another budget."""
        before = self._opening()
        self._problem = replace(self._problem, budget=budget)
        if len(self._stages) == 1 and self._stages[0].number < 0:
            self._stages[0].left += self._opening() - before
            tell_budget(self._stages[0].strategy, max(self._opening(), 1))

    def _opening(self) -> int:
        """Suggestions for all coordinates at once."""
        return int(np.ceil(self._first * self._problem.budget))

    def _next_window(self) -> _Stage:
        """Begin the next window around the best that is known."""
        number = (self._stages[-1].number + 1) % len(self._windows) if self._stages else 0
        window = Window(self._problem, self._windows[number], self._incumbent(), HALF)
        length = (self._problem.budget - self._opening()) // len(self._windows)
        seed = int(self._rng.integers(2**32))
        return self._begin(number, window, max(length, LEAST), seed)

    def _begin(self, number: int, window: Window, length: int, seed: int) -> _Stage:
        problem = window.problem(length, self._results)
        method = Quadratic if choose(problem.dim, 1, length) == "quadratic" else CmaEs
        strategy = method(problem, seed)
        self._stages.append(_Stage(number, window, strategy, length))
        return self._stages[-1]

    def _incumbent(self) -> Point:
        """The point with the lowest loss of those inside the box, the earliest of several."""
        known = [
            (self._problem.scalarise(result.losses), result.point)
            for result in self._results
            if result.losses is not None
            and bool(np.all(result.point >= self._problem.lower))
            and bool(np.all(result.point <= self._problem.upper))
        ]
        return min(known, key=itemgetter(0))[1] if known else self._problem.start


def windows_of(problem: Problem, count: int) -> list[Indices]:
    """Coordinates of each window, the topmost first; windows without any are left out.

    Raises:
        InputError: If the space's coefficients do not differ with depth.
    """
    depths = coordinate_depths(problem.space, problem.dim)
    free = problem.width > 0
    numbers = np.minimum(((1.0 - depths) * count).astype(int), count - 1)
    windows = [np.flatnonzero(free & (numbers == number)) for number in range(count)]
    found = [window for window in windows if window.size]
    if problem.space is not None and count > 1 and len(set(depths)) == 1 and problem.dim > 1:
        raise InputError(
            "strategy: block_coordinate needs coefficients that differ with depth, received a "
            f"{problem.space.title} space; choose space.granularity: block, or strategy: auto"
        )
    return found or [np.arange(problem.dim)]


def coordinate_depths(space: Space | None, dim: int) -> Array:
    """The lowest depth at which each coordinate acts: 0 the first block, 1 the last ``(dim,)``.

    What comes after the blocks counts as the last of them, what comes before, or acts everywhere,
    as the first. Coordinates of a plain box count in their order.

    Raises:
        InputError: If the space is not one of coefficients.
    """
    if space is None or isinstance(space, BoxSpace):
        return np.linspace(0.0, 1.0, dim)
    if not isinstance(space, CoefficientSpace):
        raise InputError(
            "strategy: block_coordinate needs a space of coefficients, received a "
            f"{space.title} space; choose space.granularity: block, or strategy: auto"
        )
    roles = roles_of(space.layout.names)
    axes = block_axes(roles.values())
    outside = {"final": 1.0, "head": 1.0}
    tensors = {name: depth_in(role, axes) for name, role in roles.items()}
    lowest = []
    for group in space.groups:
        own = ((tensors[name], roles[name].part) for name in group.tensors)
        lowest.append(min(outside.get(part, 0.0) if d is None else d for d, part in own))
    coordinates = space.coordinates
    terms = [
        min(lowest[int(index)] for index in curve.groups)
        for curve in coordinates.curves
        for _ in range(curve.basis.terms)
    ]
    labels = np.array([*terms, *(lowest[int(index)] for index in coordinates.own)])
    return np.tile(labels, dim // max(labels.size, 1))
