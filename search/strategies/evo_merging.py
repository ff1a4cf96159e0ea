"""Evo-Merging: two chained CMA-ES searches over a pool of adapters.

Chen 2025, "Black-box model merging for language-model-as-a-service with massive model repositories"
(arXiv 2509.12951). The first half of the coordinates is what is kept, alpha, the second half the
signed scales, beta (:class:`spaces.AdapterSpace`). Stage 1, denoising, searches alpha with beta as
it starts; stage 2, sign-aware scaling, searches beta with alpha as stage 1 left it. Otherwise than
in the authors' code:

* Every stage has a best of its own. One shared best, under two different regularisers, can hand
  stage 2 the untouched scales back.
* The L1 terms are in units of the anchors' range, like the loss that they are added to.
* Stages are counted in suggestions (a third of the budget, then the rest) and nothing waits: alpha
  is fixed when the first suggestion of stage 2 is asked for, and results of stage 1 that come later
  are too late for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field as Bound

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.cma_es import CmaEs
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook


class EvoMerging:
    """Two stages of CMA-ES: what to keep of each adapter, then its signed scale.

    Args:
        problem: A box of even dimension: what is kept of every adapter, then every adapter's scale.
        seed: Each stage's seed is drawn from it.
        sigma: First step size of both stages as a fraction of the range.
        population: Results per update of both stages.
        penalty: Weight of mean |alpha| in stage 1, and of mean |beta| in stage 2, in units of the
            anchors' range.
        denoise: Share of the budget that stage 1 gets.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        sigma: Annotated[float, Bound(gt=0, le=1)] = 0.05,
        population: Annotated[int, Bound(ge=4)] = 20,
        penalty: Annotated[float, Bound(ge=0)] = 0.05,
        denoise: Annotated[float, Bound(ge=0, le=1)] = 1 / 3,
    ) -> None:
        if problem.dim % 2:
            raise InputError(
                "strategy.evo_merging: expected an even number of coordinates, what is kept and a "
                "scale for every "
                f"adapter, received {problem.dim}; choose the operator lora_sparse, or strategy "
                "cma_es"
            )
        self._problem = problem
        self._sigma = sigma
        self._population = population
        self._penalty = penalty
        self._seeds = np.random.SeedSequence(seed).generate_state(2)
        self._denoise = denoise
        self._first = round(denoise * problem.budget)
        self._book = SuggestionBook[tuple[Stage, int]]()  # tickets: stage, its own id
        half = problem.dim // 2
        self._stage = self._new_stage(0, slice(0, half), problem.start)
        for anchor in problem.anchors:
            self._stage.tell(anchor, None)

    def ask(self, count: int) -> list[Suggestion]:
        """Samples of the current stage's distribution."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """The current stage learns from its own results and from those that fit it.

        Results of others fit where they have what the stage holds fixed.
        """
        for trial in trials:
            stage, own_id = self._book.redeem(trial) or (self._stage, None)
            if trial.evaluated is None and stage is self._stage:
                stage.tell(trial, own_id)

    def best(self) -> list[Point]:
        """The mean of the current stage's distribution, beside what it holds fixed."""
        return self._stage.recommended()

    def set_budget(self, budget: int) -> None:
        """Divide another budget between the stages, as far as stage 1 is not over."""
        self._problem = replace(self._problem, budget=budget)
        if self._book.issued <= self._first:
            self._first = max(round(self._denoise * budget), self._book.issued)
            self._stage.set_budget(max(self._first, 1))
        else:
            self._stage.set_budget(max(budget - self._first, 1))

    def _suggest(self) -> Suggestion:
        if self._book.issued == self._first:
            half = self._problem.dim // 2
            self._stage = self._new_stage(1, slice(half, 2 * half), self._stage.winner())
        own_id, point = self._stage.ask()
        return self._book.issue(point, (self._stage, own_id))

    def _new_stage(self, number: int, part: slice, start: Point) -> Stage:
        budget = max(self._problem.budget - self._book.issued, 1) if number else max(self._first, 1)
        problem = replace(self._problem, start=start, budget=budget)
        seed = int(self._seeds[number])
        search = CmaEs(_inner(problem, part), seed, sigma=self._sigma, population=self._population)
        return Stage(problem, part, search, self._penalty)


class Stage:
    """CMA-ES over some coordinates, with the others fixed at the start of ``problem``.

    Args:
        problem: The whole box.
        part: The coordinates that are searched.
        search: CMA-ES over them; its one loss is the stage's score.
        penalty: Weight of their mean magnitude.
    """

    def __init__(self, problem: Problem, part: slice, search: CmaEs, penalty: float) -> None:
        self._problem = problem
        self._part = part
        self._search = search
        self._penalty = penalty
        self._best: tuple[float, Point] | None = None

    def ask(self) -> tuple[int, Point]:
        """The stage's own id of the next suggestion, and its point in the whole box."""
        suggestion = self._search.ask(1)[0]
        return suggestion.id, self._whole(suggestion.point)

    def tell(self, trial: TrialResult, own_id: int | None) -> None:
        """Learn from a result; ``own_id`` is None for results of others."""
        if own_id is None and not self._agrees(trial.point):
            return
        inner = trial.point[self._part]
        losses = None
        if trial.losses is not None:
            # F = loss + penalty · mean|x|, x being alpha in stage 1 and beta in stage 2
            score = self._problem.scalarise(trial.losses) + self._penalty * float(
                np.abs(inner).mean()
            )
            losses = np.array([score])
            if self._best is None or score < self._best[0]:
                self._best = score, inner.copy()
        self._search.tell([TrialResult(own_id, inner, losses)])

    def set_budget(self, budget: int) -> None:
        """Tell CMA-ES how many suggestions the stage has in all."""
        self._search.set_budget(budget)

    def winner(self) -> Point:
        """The best point of the whole box by the stage's own score, or the start."""
        return self._problem.start if self._best is None else self._whole(self._best[1])

    def recommended(self) -> list[Point]:
        """What CMA-ES recommends, as points of the whole box."""
        return [self._whole(point) for point in self._search.best()]

    def _whole(self, inner: Point) -> Point:
        point = self._problem.start.copy()
        point[self._part] = inner
        return point

    def _agrees(self, point: Point) -> bool:
        """Whether a point agrees with what the stage holds fixed."""
        return bool(np.allclose(self._whole(point[self._part]), point, rtol=0, atol=1e-12))


def _inner(problem: Problem, part: slice) -> Problem:
    """The coordinates of a stage as a box of their own, with one loss that is taken as it is."""
    return replace(
        problem,
        lower=problem.lower[part],
        upper=problem.upper[part],
        start=problem.start[part],
        objectives=1,
        scale=np.array([[0.0, 1.0]]),
        weights=np.ones(1),
        anchors=(),
        space=None,
    )
