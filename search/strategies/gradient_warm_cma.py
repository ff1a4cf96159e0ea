"""A few gradient steps, then CMA-ES from their end, with the scale that they learned.

Gradients of a smooth stand-in (entropy, alignment, cross-entropy) find the region; the search there
minimises what the study measures, whose gradient nobody has (accuracy, worst domain). Hansen 2016,
"The CMA Evolution Strategy: A Tutorial", with Kingma 2015, "Adam: a method for stochastic
optimization" before it. Near an optimum the mean square of a log-likelihood's gradient is its
curvature (the Fisher information), so coordinate i begins with a standard deviation in proportion
to 1 / √v_i, v being Adam's second moments; their geometric mean is the usual first step, and no
coordinate differs from it by more than a factor of ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field as Bound

from mergesearch.evaluators import Batch
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.cma_es import CmaEs
from mergesearch.search.strategies.parts.gradient_walks import (
    GradientWalk,
    ParallelWalks,
    followed,
    varied,
)
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.workers.gradient_steps import OptimizerConfig

#: How far a coordinate's first step may be from the mean.
RANGE = 10.0


class GradientWarmCma:
    """Gradient steps, then CMA-ES.

    Args:
        problem: The box, and which objectives have gradients.
        seed: Shuffles the items, and seeds CMA-ES.
        warm: Trials with gradient steps before CMA-ES begins; at most a quarter of the budget.
        steps: Gradient steps of each of these trials.
        learning_rate: Of Adam.
        batch_size: Items of every domain in a batch; 0 takes all of them.
        sigma: First step size of CMA-ES as a fraction of the range.
        population: Results per update of CMA-ES; by default as for cma_es.
        objectives: Names of the objectives to follow, by default all that have gradients.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        warm: Annotated[int, Bound(ge=1)] = 8,
        steps: Annotated[int, Bound(ge=1)] = 25,
        learning_rate: Annotated[float, Bound(gt=0)] = 3e-3,
        batch_size: Annotated[int, Bound(ge=0)] = 16,
        sigma: Annotated[float, Bound(gt=0, le=1)] = 0.05,
        population: Annotated[int, Bound(ge=4)] | None = None,
        objectives: list[str] | None = None,
    ) -> None:
        self._problem = problem
        self._seed = seed
        self._sigma = sigma
        self._population = population
        config = OptimizerConfig(
            problem.lower,
            problem.upper,
            problem.start,
            followed(problem, objectives, "gradient_warm_cma"),
            learning_rate=learning_rate,
            batch=Batch(size=batch_size or None, seed=seed),
        )
        self._walks: list[GradientWalk] = []
        self._parallel_walks = ParallelWalks(
            problem, lambda number: self._new_walk(varied(config, number), steps), None
        )
        self._warm = warm
        self._left = _warm_trials(warm, problem.budget)
        self._cma: CmaEs | None = None
        self._begun = 0  # suggestions before CMA-ES
        self._book = SuggestionBook[int]()  # tickets: ids at CMA-ES
        # Where the walks led: while it has not been asked for, its id, and its loss once measured.
        self._end: Point | None = None
        self._end_id: int | None = None
        self._measured_end: tuple[float, Point] | None = None

    def _new_walk(self, config: OptimizerConfig, steps: int) -> GradientWalk:
        self._walks.append(GradientWalk(config, self._problem.start, steps))
        return self._walks[-1]

    def ask(self, count: int) -> list[Suggestion]:
        """Gradient steps first, later samples of CMA-ES."""
        return [self._suggest() for _ in range(count)]

    def _suggest(self) -> Suggestion:
        if self._cma is None:
            return self._book.relay(self._parallel_walks.ask(1)[0])
        if self._end is not None:
            end = self._book.issue(self._end)
            self._end = None
            self._end_id = end.id
            return end
        suggestion = self._cma.ask(1)[0]
        return self._book.relay(suggestion, suggestion.id)

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Walk on, or update the distribution.

        Once CMA-ES has begun, late results of the walks are results of others to it.
        """
        for trial in trials:
            if self._cma is None:
                self._parallel_walks.tell([trial])
                self._left -= trial.id is not None
                if self._left <= 0:
                    self._cma = self._begin()
                continue
            self._cma.tell([replace(trial, id=self._book.redeem(trial))])
            of_the_end = trial.id is not None and trial.id == self._end_id
            if of_the_end and trial.losses is not None:
                self._measured_end = self._problem.scalarise(trial.losses), trial.point

    def best(self) -> list[Point]:
        """The end of the best walk, until CMA-ES has a lower level."""
        if self._cma is None:
            return self._parallel_walks.best()
        if self._measured_end is not None and self._measured_end[0] <= self._cma.level:
            return [self._measured_end[1]]
        return self._cma.best()

    def set_budget(self, budget: int) -> None:
        """Warm up by another budget, or tell CMA-ES once it has begun."""
        before = self._problem.budget
        self._problem = replace(self._problem, budget=budget)
        if self._cma is None:
            self._left += _warm_trials(self._warm, budget) - _warm_trials(self._warm, before)
        else:
            self._cma.set_budget(max(budget - self._begun, 1))

    def _begin(self) -> CmaEs:
        """CMA-ES from where the best walk stands."""
        leader = self._parallel_walks.leader()
        start = self._problem.start
        scale = None
        if leader is not None:
            walk = self._walks[leader]
            start = walk.point
            scale = step_scale(walk.state.moments[1])
        self._end = start
        self._begun = self._book.issued
        budget = max(self._problem.budget - self._begun, 1)
        problem = replace(self._problem, start=start, budget=budget)
        return CmaEs(
            problem, self._seed, None, scale, sigma=self._sigma, population=self._population
        )


def _warm_trials(warm: int, budget: int) -> int:
    """Trials with gradient steps: at most a quarter of the budget, and at least one."""
    return max(min(warm, budget // 4), 1)


def step_scale(second_moments: Point) -> Point | None:
    """First steps of the coordinates relative to their geometric mean ``(dim,)``.

    None where there were no gradients.

    Args:
        second_moments: Adam's, ``(dim,)``.
    """
    seen = second_moments > 0
    if not np.any(seen):
        return None
    # σ_i ∝ 1 / √v_i, in logarithms
    logarithms = np.full(second_moments.size, np.nan)
    logarithms[seen] = -0.5 * np.log(second_moments[seen])
    relative = logarithms - logarithms[seen].mean()
    # Coordinates without a gradient change nothing that was followed: the usual step.
    return np.asarray(
        np.exp(np.clip(np.nan_to_num(relative, nan=0.0), -np.log(RANGE), np.log(RANGE)))
    )
