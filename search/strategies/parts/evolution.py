"""The asynchronous loop that evolutionary strategies for several objectives share.

Selection, crossover, mutation and survival are pymoo's (Blank 2020, "pymoo: Multi-Objective
Optimization in Python"); ours is how they are driven:

* No generation. Every ask breeds one child from the population as it is, and every result enters it
  at once and has one member leave (the steady state of Durillo 2009, "On the Effect of the
  Steady-State Selection Scheme in Multi-Objective Genetic Algorithms"). Nobody waits for
  stragglers.
* Anchors are members without being measured again. The start, mixtures of anchors and normal draws
  around those that no other anchor dominates complete the first population.
* Failures never become members: that ranks them below every result. Results that nobody asked for
  do become members.
* No point is proposed that was asked or told before, with one exception: a member whose losses are
  estimates from some of the items, and that no other member dominates, is asked once more for its
  losses on all items. The same items are never measured twice for the sake of their noise.
* Losses are scaled by the range of the anchors, as pymoo's normalisation has absolute thresholds.

pymoo draws from this strategy's own generator, which every call is given.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mergesearch.search.front import nondominated
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.seeding import (
    draw_near,
    first_points,
    key_of,
    known_merges,
)
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.strategies.parts.unit_box import UnitBox

#: Members by default; fewer where the budget is short, so that at least a few generations' worth is
#: bred.
POPULATION = 40
GENERATIONS = 5
LEAST_POPULATION = 10
#: How often a child that is known already is bred anew before a draw near a member takes its place.
ATTEMPTS = 10


@dataclass(frozen=True, eq=False)
class Parts:
    """What an algorithm takes from pymoo.

    Attributes:
        compare: Decides binary tournaments.
        crossover: Options of simulated binary crossover.
        survive: ``(population, n_survive=, problem=, random_state=)`` -> members that stay.
        context: Further arguments of ``compare``.
    """

    compare: Callable[..., Any]
    crossover: dict[str, float]
    survive: Callable[..., Any]
    context: dict[str, Any] = field(default_factory=dict)


class Evolution:
    """A population in coordinates of the unit box, over the dimensions that are free."""

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = False

    def __init__(
        self,
        problem: Problem,
        rng: np.random.Generator,
        parts: Parts,
        size: int,
        sigma: float | None,
    ) -> None:
        self._problem = problem
        self._rng = rng
        self._size = size
        self._sigma = sigma
        self._unit = UnitBox(problem)
        self._book = SuggestionBook[None]()
        self._seen: set[bytes] = set()  # digests of points asked or told
        self._doubtful: deque[Point] = deque()  # to be asked again on all items
        self._confirmed: set[bytes] = set()  # digests of points that were
        self._start_engine(parts)
        known = known_merges(problem)
        self.tell(known)
        self._waiting = deque(first_points(problem, rng, max(size - len(known), 0), sigma))

    def _start_engine(self, parts: Parts) -> None:
        from pymoo.core.mating import Mating
        from pymoo.core.population import Population
        from pymoo.core.problem import Problem as Box
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.selection.tournament import TournamentSelection

        self._parts = parts
        self._box = Box(n_var=self._unit.dim, n_obj=self._problem.objectives, xl=0.0, xu=1.0)
        self._members = Population.create()
        self._mating = Mating(
            TournamentSelection(func_comp=parts.compare),
            SBX(n_offsprings=1, **parts.crossover),
            PM(eta=20),
        )

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` points: the first population, then children of the current one."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Every whole result becomes a member, and survival decides at once who leaves."""
        for trial in trials:
            self._seen.add(_digest(trial.point))
            if trial.estimated is not None and _digest(trial.point) in self._confirmed:
                continue  # all items say more
            if trial.losses is not None and trial.evaluated is None and self._unit.dim:
                self._enter(trial.point, self._problem.normalise(trial.losses))
                if trial.estimated is not None and self._leads(trial.point):
                    self._doubtful.append(trial.point)

    def keep_at_least(self, size: int) -> None:
        """Let the population grow to so many members; it never shrinks."""
        self._size = max(self._size, size)

    def best(self) -> list[Point]:
        """Nothing beyond the best trials."""
        return []

    def _suggest(self) -> Suggestion:
        point = self._next_point()
        self._seen.add(_digest(point))
        return self._book.issue(point)

    def _next_point(self) -> Point:
        if not self._unit.dim:
            return self._problem.start.copy()
        while self._doubtful:
            point = self._doubtful.popleft()
            if _digest(point) not in self._confirmed and self._leads(point):
                self._confirmed.add(_digest(point))
                return point
        while self._waiting:
            point = self._waiting.popleft()
            if _digest(point) not in self._seen:  # somebody else may have tried it meanwhile
                return point
        if len(self._members) < 2:
            return draw_near(self._problem.start, self._problem, self._rng, self._sigma)
        return self._child()

    def _child(self) -> Point:
        """A child that was neither asked nor told before."""
        for _ in range(ATTEMPTS):
            bred = self._mating.do(
                self._box, self._members, 1, random_state=self._rng, **self._parts.context
            )
            point = self._unit.to_point(bred[0].X)
            if _digest(point) not in self._seen:
                return point
        parent = self._members[int(self._rng.integers(len(self._members)))]
        return draw_near(self._unit.to_point(parent.X), self._problem, self._rng, self._sigma)

    def _leads(self, point: Point) -> bool:
        """Whether a point is a member that no other member dominates."""
        unit = self._unit.to_unit(point)
        leading = nondominated(self._members.get("F"))
        return any(np.array_equal(member.X, unit) for member in self._members[leading])

    def _enter(self, point: Point, losses: Point) -> None:
        """Add a member, in place of one at the same point, and let the worst of too many leave."""
        from pymoo.core.individual import Individual
        from pymoo.core.population import Population

        unit = self._unit.to_unit(point)
        others = [member for member in self._members if not np.array_equal(member.X, unit)]
        crowd = Population.create(*others, Individual(X=unit, F=losses))
        with (
            warnings.catch_warnings()
        ):  # NSGA-III's survival switches off every warning of the process, for good
            self._members = self._parts.survive(
                problem=self._box, pop=crowd, n_survive=self._size, random_state=self._rng
            )


def default_population(budget: int) -> int:
    """40 members, or a fifth of the budget where that is less."""
    return int(np.clip(budget // GENERATIONS, LEAST_POPULATION, POPULATION))


def _digest(point: Point) -> bytes:
    """Sixteen bytes that stand for a point.

    Thousands of points of thousands of dimensions are remembered.
    """
    return hashlib.blake2b(key_of(point), digest_size=16).digest()
