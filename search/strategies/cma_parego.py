"""Several CMA-ES side by side, each with its own weighting of the objectives.

Knowles 2006, "ParEGO: A Hybrid Algorithm With On-Line Landscape Approximation for Expensive
Multiobjective Optimization Problems": the augmented Tchebycheff function of a weighting has its
minimum on the front, also where the front is concave, and every point of the front belongs to some
weighting. What we change:

* CMA-ES searches instead of a Gaussian process, which does not bear hundreds of coordinates; so
  each weighting of a fixed lattice has an instance of its own for the whole study instead of a
  random one in each iteration. Weightings drawn anew, for short runs one after the other or in
  every update, cover less of the front of merges (experiments/LOG.md).
* Losses are shifted by the lowest seen of each objective, from anchors and results alike, and
  divided by the range of the anchors (``Problem.scale``), which unlike the range of the results
  does not depend on how bad the worst is.
* The instances take turns. Every result is offered to all of them; those of others enter as
  injected solutions.

With one objective there is one weighting, and this is CMA-ES.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.cma_es import CmaEs
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook

Array = npt.NDArray[np.float64]

#: Weight of the sum beside the maximum (Knowles 2006, below eq. 2): no point that another dominates
#: is a minimum.
AUGMENTATION = 0.05


class CmaParEgo:
    """One CMA-ES for every weighting of a lattice.

    Args:
        problem: The box and the losses.
        seed: Seed of the strategy's generator.
        divisions: Weights are multiples of one part in so many; default 1: each objective alone,
            and all equally.
        sigma: First step size of each CMA-ES as a fraction of the range; default 0.15, and 0.1
            above 100 dimensions.
        population: Results per update of each; default ``4 + 3 ln d``, at least 32 above 256
            dimensions.
        covariance: ``full``, ``separable`` (diagonal), or ``auto``: full up to 200 dimensions.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        divisions: Annotated[int, Bound(ge=1)] | None = None,
        sigma: Annotated[float, Bound(gt=0, le=1)] | None = None,
        population: Annotated[int, Bound(ge=4)] | None = None,
        covariance: Literal["auto", "full", "separable"] = "auto",
    ) -> None:
        low = problem.scale[:, 0]
        high = problem.scale[:, 1]
        self._ideal = np.full(problem.objectives, np.inf)
        self._range = high - low
        for anchor in problem.anchors:
            self._see(anchor)
        weightings = lattice(problem.objectives, divisions or 1)
        # The first recommendation is that of the weighting nearest to the study's.
        weightings = sorted(
            weightings, key=lambda weights: float(np.sum((weights - problem.weights) ** 2))
        )
        part = replace(problem, budget=problem.budget // len(weightings))
        seeds = np.random.default_rng(seed).integers(2**32, size=len(weightings))
        self._members = [
            CmaEs(
                part,
                int(seed),
                partial(self._tchebycheff, weights),
                sigma=sigma,
                population=population,
                covariance=covariance,
            )
            for weights, seed in zip(weightings, seeds, strict=True)
        ]
        self._book = SuggestionBook[tuple[int, int]]()  # tickets: member, its own id

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` suggestions of the members in turn."""
        return [self._suggest() for _ in range(count)]

    def _suggest(self) -> Suggestion:
        turn = self._book.issued % len(self._members)
        suggestion = self._members[turn].ask(1)[0]
        return self._book.relay(suggestion, (turn, suggestion.id))

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Tell every member every result; its proposer as the result of its own suggestion."""
        for trial in trials:
            self._see(trial)
            owner, own_id = self._book.redeem(trial) or (None, None)
            for number, member in enumerate(self._members):
                member.tell([replace(trial, id=own_id if number == owner else None)])

    def set_budget(self, budget: int) -> None:
        """Every member gets an equal part of another budget."""
        for member in self._members:
            member.set_budget(budget // len(self._members))

    def best(self) -> list[Point]:
        """The mean of each member, that of the weighting nearest to the study's first."""
        return [point for member in self._members for point in member.best()]

    def _see(self, trial: TrialResult) -> None:
        if trial.losses is not None and trial.evaluated is None:
            self._ideal = np.minimum(self._ideal, trial.losses)

    def _tchebycheff(self, weights: Array, losses: Array) -> float:
        """Knowles 2006, eq. 2, on losses ``(objectives,)`` shifted by the lowest seen."""
        # max_i λ_i f_i + ρ Σ_i λ_i f_i, f_i the normalised losses
        parts = weights * (losses - self._ideal) / self._range
        return float(np.max(parts) + AUGMENTATION * np.sum(parts))


def lattice(objectives: int, divisions: int) -> list[Array]:
    """Weightings ``(objectives,)`` in multiples of ``1 / divisions``, and the equal one.

    The weights of each sum to 1.

    Knowles 2006, eq. 1; Das and Dennis 1998, "Normal-Boundary Intersection". The equal weighting is
    added where the lattice has none inside the simplex.
    """
    points = [np.array(counts) / divisions for counts in _compositions(divisions, objectives)]
    inside = any(np.all(weights > 0) for weights in points)
    return points if inside else [*points, np.full(objectives, 1.0 / objectives)]


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``total`` as ``parts`` ordered summands, zeros included."""
    for bars in itertools.combinations(range(total + parts - 1), parts - 1):
        ends = (-1, *bars, total + parts - 1)
        yield tuple(after - before - 1 for before, after in itertools.pairwise(ends))
