"""Gradients of proxies first, then a surrogate of what is measured, from coarse to fine.

Gradients of a smooth stand-in (cross-entropy, alignment, entropy) find the region at a fraction of
the cost of a search without them: Yang 2024, "AdaMerging: Adaptive Model Merging for Multi-Task
Learning" (arXiv 2310.02575). What is measured has no gradient (accuracy), and its optimum is
another. So:

* Walks along the proxies come first (``parts/proxy_walks.py``), each weighted by how well it
  predicts the measured losses. Their cost in evaluations of items is bounded by a share of the
  budget; a gradient counts three.
* Then the quadratic surrogate (Powell 2006, "The NEWUOA software for unconstrained optimization
  without derivatives") searches around the mean of the walks' ends: first with one coordinate for
  each task, each block and each principal direction of the walks, then for the blocks of each task,
  for its tensors, and at last with all coordinates. Every result counts in each of the boxes that
  hold it.
* ``best`` recommends the mean of the walks' ends, unless the surrogate's trials are better by more
  than the standard error of a measurement: what is less is as likely to be the luck of the items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field as Bound

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import (
    Point,
    Problem,
    Strategy,
    Suggestion,
    TrialResult,
    tell_budget,
)
from mergesearch.search.strategies.cma_es import CmaEs
from mergesearch.search.strategies.parts.coarse_box import Array, CoarseBox, coarse_levels
from mergesearch.search.strategies.parts.gradient_walks import WalkStep
from mergesearch.search.strategies.parts.proxy_walks import ProxyWalks
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.strategies.quadratic import Quadratic

#: Half-widths of the boxes around the walks' end, as fractions of the box.
HALF = 0.25
#: Share of what is left of the budget that each box of groups may spend.
COARSE = 0.25
#: Newest results of the surrogate that are compared with the walks' end.
NEWEST = 16


@dataclass(eq=False)
class _Stage:
    """A search in a box around the walks' end.

    Attributes:
        box: The coordinates.
        strategy: Searches them.
        budget: Suggestions that the strategy expects.
        left: Suggestions until the next stage begins.
        losses: Of its own results.
    """

    box: CoarseBox
    strategy: Strategy
    budget: int
    left: int
    losses: list[float] = field(default_factory=list)

    @property
    def level(self) -> float:
        """Median of the newest losses; infinite while there are too few."""
        newest = self.losses[-NEWEST:]
        return float(np.median(newest)) if len(newest) >= NEWEST // 2 else np.inf


@dataclass(frozen=True, eq=False)
class _Ticket:
    """What a suggestion was for.

    Attributes:
        place: Number of the stage; -1 for a walk.
        number: Its id at the stage's strategy, or the number of the walk.
        step: Of the walk.
        coarse: The point in the stage's box.
    """

    place: int
    number: int
    step: WalkStep | Point | None = None
    coarse: Point | None = None


class Hybrid:
    """Walks along gradients of proxies, then a surrogate around their end.

    Args:
        problem: The box, and which losses have gradients.
        seed: Shuffles the items, and seeds the surrogate.
        share: Part of the budget that the walks may cost, in evaluations of items.
        learning_rate: Of Adam, as a fraction of the box; by default by the number of steps.
        batch_size: Items of every domain in a batch of the first walks; by default by the budget.
        proxies: Names of the losses to follow; by default all that have gradients.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"proxy"})
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        share: Annotated[float, Bound(gt=0, le=1)] = 0.5,
        learning_rate: Annotated[float, Bound(gt=0)] | None = None,
        batch_size: Annotated[int, Bound(ge=1)] | None = None,
        proxies: list[str] | None = None,
    ) -> None:
        self._problem = problem
        self._rng = np.random.default_rng(seed)
        losses = followable(problem, proxies)
        self._walks = ProxyWalks(problem, seed, losses, share, learning_rate, batch_size)
        self._book = SuggestionBook[_Ticket]()
        self._results = list(problem.anchors)
        self._error = 0.0
        self._levels: list[Array | None] = []
        self._stages: list[_Stage] = []

    def ask(self, count: int) -> list[Suggestion]:
        """Trials of walks first, later those of the surrogate."""
        return [self._suggest() for _ in range(count)]

    def _suggest(self) -> Suggestion:
        if not self._stages:
            proposal = self._walks.propose()
            if proposal is not None:
                return self._walk(*proposal)
            self._next_stage()
        stage = self._stages[-1]
        if stage.left <= 0 and stage.box.columns is not None:
            stage = self._next_stage()
        stage.left -= 1
        own = stage.strategy.ask(1)[0]
        ticket = _Ticket(len(self._stages) - 1, own.id, coarse=own.point)
        return self._book.issue(stage.box.to_fine(own.point), ticket)

    def _walk(self, number: int, step: WalkStep | Point) -> Suggestion:
        ticket = _Ticket(-1, number, step)
        if not isinstance(step, WalkStep):
            return self._book.issue(step, ticket)
        return self._book.issue(
            step.point, ticket, gradient_steps=step.gradient_steps, notes=step.notes
        )

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Lead the walks on, and tell every stage whose box holds the point."""
        for trial in trials:
            ticket = self._book.redeem(trial)
            if trial.losses is not None and trial.evaluated is None:
                self._results.append(trial)
                self._error = self._walks.error_of(trial) or self._error
            if ticket is not None and ticket.step is not None:
                self._walks.learn(ticket.number, ticket.step, trial)
            for place, stage in enumerate(self._stages):
                if ticket is not None and ticket.place == place:
                    self._tell_own(stage, trial, ticket)
                elif (point := stage.box.to_coarse(trial.point)) is not None:
                    stage.strategy.tell([replace(trial, id=None, point=point)])

    def _tell_own(self, stage: _Stage, trial: TrialResult, ticket: _Ticket) -> None:
        """Tell a stage the result of its own suggestion."""
        assert ticket.coarse is not None
        if trial.losses is not None and trial.evaluated is None:
            stage.losses.append(self._problem.scalarise(trial.losses))
        stage.strategy.tell([replace(trial, id=ticket.number, point=ticket.coarse)])

    def best(self) -> list[Point]:
        """The walks' end, unless the trials of a stage are better by more than an error."""
        end = self._walks.best()
        for stage in reversed(self._stages):
            better = end is None or stage.level < end[0] - self._error
            if better and (points := stage.strategy.best()):
                return [stage.box.to_fine(points[0])]
        return [] if end is None else [end[1]]

    def set_budget(self, budget: int) -> None:
        """Divide another budget: between walks that go on, and the stages that are to come."""
        more = budget - self._problem.budget
        self._problem = replace(self._problem, budget=budget)
        self._walks.set_budget(budget)
        if self._stages and self._stages[-1].box.columns is None:
            stage = self._stages[-1]
            stage.budget = max(stage.budget + more, 1)
            tell_budget(stage.strategy, stage.budget)

    def _left(self) -> int:
        searched = sum(len(stage.losses) for stage in self._stages)
        return max(int(self._problem.budget - self._walks.spent) - searched, 1)

    def _next_stage(self) -> _Stage:
        """Search a finer box around the best that is known."""
        if not self._stages:
            self._levels = coarse_levels(self._problem, self._walks.path)
        columns = self._levels[len(self._stages)]
        box = CoarseBox(self._problem, self._centre(), columns, HALF)
        left = self._left()
        budget = left if columns is None else max(int(COARSE * left), 1)
        self._stages.append(_Stage(box, self._search(box, budget), budget, budget))
        return self._stages[-1]

    def _centre(self) -> Point:
        best = self.best()
        return best[0] if best else self._problem.start

    def _search(self, box: CoarseBox, budget: int) -> Strategy:
        """The surrogate in a box; CMA-ES where there are too many coordinates for it."""
        problem = box.problem(budget, self._results)
        seed = int(self._rng.integers(2**32))
        try:
            return Quadratic(problem, seed)
        except InputError:
            return CmaEs(problem, seed)


def followable(problem: Problem, names: Sequence[str] | None) -> list[Mapping[str, float]]:
    """What walks can follow: what is measured itself if all of it has gradients, and each proxy.

    Where a part of the objectives has gradients, each of these is a proxy like any other loss.

    Raises:
        InputError: If there is nothing to follow, or a name is not among the losses with gradients.
    """
    given = [*problem.differentiable, *problem.proxies]
    odd = sorted(set(names or ()) - set(given))
    if odd or not given:
        raise InputError(
            f"strategy.proxies: expected names among {given}, which hybrid can follow, received "
            f"{odd or 'none'}; choose quadratic where nothing has gradients"
        )
    wanted = list(names or given)
    width = problem.scale[:, 1] - problem.scale[:, 0]
    if not set(problem.names) <= set(wanted):
        return [{name: 1.0} for name in wanted]
    scaled = problem.weights / width
    shares = (scaled / scaled.sum()).tolist()
    others = [{name: 1.0} for name in wanted if name not in problem.names]
    return [dict(zip(problem.names, shares, strict=True)), *others]
