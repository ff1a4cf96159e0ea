"""The contract of every search strategy.

A strategy proposes points of a box and learns from their results::

    strategy = CmaEs(problem, seed=0)
    a, b = strategy.ask(2)               # two suggestions, ids 0 and 1; nothing is known yet
    strategy.tell([TrialResult(b.id, b.point, losses)])    # results come in any order
    strategy.tell([TrialResult(a.id, a.point, None)])      # a failed trial is told too, as None
    strategy.best()                      # points worth a re-evaluation, beside the best trials

Rules, checked for every member by ``tests/contracts/test_strategies.py``:

* ``ask(n)`` gives the same points as n times ``ask(1)``; it never waits for outstanding results.
* State is a function of the calls: the same asks and tells in the same order give the same points.
  There is nothing to pickle; a resumed study replays its log.
* Points lie inside the box. Losses are always minimised. Failures are ranked worst, never imputed
  as numbers.
* Randomness comes from one ``numpy.random.Generator`` made from the seed; no global generator is
  touched.
* Results that the strategy did not ask for come with ``id`` None (a neighbour in a portfolio); it
  may learn from them or ignore them, but it must accept them.
* A strategy that plans by ``Problem.budget`` has a method ``set_budget``, which tells it another
  number of suggestions (:func:`tell_budget`); the others go on as they are.
* A dimension, a number of objectives or a space that it cannot work in is refused in the
  constructor, with an :class:`InputError` that says why and what to choose instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Batch
from mergesearch.search.workers.gradient_steps import GradientResult, GradientSteps

if TYPE_CHECKING:
    from mergesearch.spaces import Space

Point = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Suggestion:
    """A point to try.

    Attributes:
        id: Counts the strategy's suggestions from 0.
        point: Position in the box, float64 ``(dim,)``.
        items: Evaluate on the first so many items of the fixed order only; None means all of them,
            0 none.
        gradient_steps: Gradients to take at the point, and steps along them; for strategies that
            need gradients.
        notes: Named numbers that are recorded with the trial, for people.
    """

    id: int
    point: Point
    items: int | None = None
    gradient_steps: GradientSteps | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TrialResult:
    """The result of a trial.

    Attributes:
        id: The suggestion's, or None for a trial that this strategy did not suggest.
        point: Position in the box, float64 ``(dim,)``.
        losses: ``(objectives,)``, or None when the trial failed or was not evaluated on any item.
        items: Objective name -> loss or score of each item ``(items,)``, in the user's direction.
        evaluated: How many items the losses come from; None means all of them.
        gradient_result: The result of its gradient steps; None where there were none, or they
            failed.
        estimated: Number of items after which a rule stopped the trial, where the losses are
            estimates of those on all items; else None.
        errors: Standard errors of the losses as estimates of those on all conceivable items
            ``(objectives,)``; not finite where one is unknown. None: none is known.
    """

    id: int | None
    point: Point
    losses: npt.NDArray[np.float64] | None
    items: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    evaluated: int | None = None
    gradient_result: GradientResult | None = None
    estimated: int | None = None
    errors: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """What a strategy knows of the study, once the anchors have been measured.

    Attributes:
        lower, upper, start: The box and the point to begin at, float64 ``(dim,)``.
        objectives: Number of losses per trial.
        budget: Number of suggestions that will be asked, at most.
        scale: Losses ``(objectives, 2)`` that map to 0 and 1 when several are combined (range of
            the anchors).
        weights: Relative importance of the objectives ``(objectives,)``, summing to 1.
        anchors: Known merges that lie in the box, as measured before the search; their ``id`` is
            None.
        signs: Factor from an item's score to its loss ``(objectives,)``: -1 where the objective is
            maximised.
        names: Names of the objectives, the keys of ``TrialResult.items``.
        items: Number of items that a whole trial is evaluated on; 0 where it is not known.
        space: What the points mean, for strategies that need more than a box.
        origin: The start that the study names ``(dim,)``, whatever the anchors showed; None:
            ``start``.
        differentiable: Names of the objectives whose gradients the evaluators provide.
        proxies: Names of other losses whose gradients they provide, all of them minimised.
        batch_items: Items of a batch over all domains; None where it is not known.
    """

    lower: Point
    upper: Point
    start: Point
    objectives: int
    budget: int
    scale: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    anchors: tuple[TrialResult, ...] = ()
    signs: npt.NDArray[np.float64] | None = None
    names: tuple[str, ...] = ()
    items: int = 0
    space: Space | None = None
    origin: Point | None = None
    differentiable: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    batch_items: Callable[[Batch], int] | None = None

    @property
    def dim(self) -> int:
        """Dimension of the box."""
        return int(self.lower.size)

    @property
    def width(self) -> Point:
        """Length of each side of the box ``(dim,)``; 0 where a coordinate is fixed."""
        return self.upper - self.lower

    def normalise(self, losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Losses ``(..., objectives)`` in units of the anchors' range."""
        low = self.scale[:, 0]
        high = self.scale[:, 1]
        return np.asarray((losses - low) / (high - low))

    def scalarise(self, losses: npt.NDArray[np.float64]) -> float:
        """Weighted sum of the losses after scaling each by the range of the anchors."""
        return float(np.sum(self.weights * self.normalise(losses)))


@runtime_checkable
class PlansByBudget(Protocol):
    """A strategy whose course depends on how many suggestions it expects."""

    def set_budget(self, budget: int) -> None:
        """Expect another number of suggestions in all than ``Problem.budget`` said, from now on."""


def tell_budget(strategy: Strategy, budget: int) -> None:
    """Tell a strategy that ``budget`` suggestions will be asked in all, if it plans by that."""
    if isinstance(strategy, PlansByBudget):
        strategy.set_budget(budget)


class Strategy(Protocol):
    """What every strategy offers: asks, tells, and recommendations."""

    #: What the evaluators must provide: subset of {"items", "gradient", "proxy"}. "gradient" is
    #: that of an objective, "proxy" that of any loss; only with one of them may suggestions have
    #: gradient steps.
    needs: ClassVar[frozenset[str]]
    #: Whether ``best`` returns points of its own, such as a distribution mean.
    recommends: ClassVar[bool]

    def ask(self, count: int) -> list[Suggestion]:
        """Up to ``count`` suggestions; fewer only where nothing is left to try.

        A strategy that an option tells to have no more than so many outstanding may give none until
        results are in, and must then be as if it had not been asked.
        """

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Learn from results, in any order and any number."""

    def best(self) -> list[Point]:
        """Points worth a re-evaluation beside the best trials; only where ``recommends``."""
