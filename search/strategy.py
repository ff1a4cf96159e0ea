"""The contract of every search strategy.

A strategy proposes points of a box and learns from their results. Four calls, and what it knows after each::

    strategy = CmaEs(problem, seed=0)
    a, b = strategy.ask(2)               # two suggestions, ids 0 and 1; nothing is known yet
    strategy.tell([Told(b.id, b.point, losses)])    # results come in any order
    strategy.tell([Told(a.id, a.point, None)])      # a failed trial is told too, as None
    strategy.best()                      # points worth a re-evaluation, beside the best trials

Rules, checked for every member by ``tests/contracts/test_strategies.py``:

* ``ask(n)`` gives the same points as n times ``ask(1)``; it never waits for outstanding results.
* State is a function of the calls: the same asks and tells in the same order give the same points. There is
  nothing to pickle; a resumed study replays its log.
* Points lie inside the box. Losses are always minimised. Failures are ranked worst, never imputed as numbers.
* Randomness comes from one ``numpy.random.Generator`` made from the seed; no global generator is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

Point = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a strategy is told of the study, once anchors have been measured.

    Attributes:
        lower, upper, start: The box and the place to begin, float64 ``(dim,)``.
        objectives: Number of losses per trial.
        budget: Number of suggestions that will be asked, at most.
        scale: Losses ``(objectives, 2)`` that map to 0 and 1 when several are combined (range of the anchors).
        weights: Relative importance of the objectives ``(objectives,)``, summing to 1.
    """

    lower: Point
    upper: Point
    start: Point
    objectives: int
    budget: int
    scale: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]

    @property
    def dim(self) -> int:
        """Dimension of the box."""
        return int(self.lower.size)

    def scalarise(self, losses: npt.NDArray[np.float64]) -> float:
        """Weighted sum of the losses after scaling each by the range of the anchors."""
        low, high = self.scale[:, 0], self.scale[:, 1]
        return float(np.sum(self.weights * (losses - low) / (high - low)))


@dataclass(frozen=True, eq=False)
class Suggestion:
    """A point to try; ``id`` counts the strategy's suggestions from 0."""

    id: int
    point: Point


@dataclass(frozen=True, eq=False)
class Told:
    """The result of a suggestion: losses ``(objectives,)``, or None when the trial failed."""

    id: int
    point: Point
    losses: npt.NDArray[np.float64] | None
    items: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)


class Strategy(Protocol):
    """Ask, tell, best."""

    #: What the evaluators must provide: subset of {"items", "gradient"}.
    needs: ClassVar[frozenset[str]]
    #: Whether ``best`` returns points of its own, such as a distribution mean.
    recommends: ClassVar[bool]

    def ask(self, count: int) -> list[Suggestion]:
        """Up to ``count`` suggestions; fewer, even none, only when the strategy has nothing left to try."""

    def tell(self, trials: Sequence[Told]) -> None:
        """Learn from results, in any order and any number."""

    def best(self) -> list[Point]:
        """Points worth a re-evaluation beside the best trials; empty where ``recommends`` is False."""
