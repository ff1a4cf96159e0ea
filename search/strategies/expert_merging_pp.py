"""Expert Merging++: coefficients are refined in chunks of the tensors that change most.

Zhang 2025, "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided
Layer Chunking" (arXiv 2509.25712). It searches a space of chunks
(:mod:`mergesearch.spaces.chunk_space`).
In the first part of the budget the chunks of a tensor move as
one, which is Expert Merging; then each goes on by itself from there, and the optimizer begins anew.
What we changed: chunks are chosen by the change that the merge begins with, not by that which the
first part found, so that the space is the same all along; the second part goes on from the first
one's coefficients; and walks that run side by side share the budget, so all of them refine once the
trials of all of them make up the first part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field as Bound

from mergesearch.search.strategies.adamerging import origin_of
from mergesearch.search.strategies.base import Point, Problem, TrialResult
from mergesearch.search.strategies.expert_merging import config_of
from mergesearch.search.strategies.parts.gradient_walks import (
    GradientWalk,
    ParallelWalks,
    WalkStep,
    varied,
)
from mergesearch.search.workers.gradient_steps import OptimizerConfig, init_state
from mergesearch.spaces import CoefficientSpace


class ExpertMergingPp(ParallelWalks):
    """Expert Merging, first by tensors, then by chunks.

    Args:
        problem: The box, and which objectives have gradients.
        seed: Shuffles the items.
        steps: Steps of each trial.
        learning_rate: Of AdamW, on logits.
        batch_size: Items of every domain in a batch; 0 takes all of them.
        samples: Items of every domain that are used at all; 0 takes all of them.
        gamma: Weight of the distance from the start.
        period: Steps until the learning rate first restarts; each cycle is twice as long as the one
            before.
        whole: Share of all trials in which the chunks of a tensor move as one.
        objectives: Names of the objectives to follow, by default all that have gradients.
        shares: Trials among which the batches of a step are split; then each step is a round trip
            to the workers.
        restarts_in_parallel: Restarts that run at a time, at most; by default as many as keep the
            workers busy.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        steps: Annotated[int, Bound(ge=1)] = 10,
        learning_rate: Annotated[float, Bound(gt=0)] = 0.5,
        batch_size: Annotated[int, Bound(ge=0)] = 16,
        samples: Annotated[int, Bound(ge=0)] = 0,
        gamma: Annotated[float, Bound(ge=0)] = 0.8,
        period: Annotated[int, Bound(ge=1)] = 50,
        whole: Annotated[float, Bound(gt=0, lt=1)] = 0.5,
        objectives: list[str] | None = None,
        shares: Annotated[int, Bound(ge=1)] = 1,
        restarts_in_parallel: Annotated[int, Bound(ge=1)] | None = None,
    ) -> None:
        config = config_of(
            problem, seed, learning_rate, batch_size, samples, gamma, period, objectives
        )
        config = replace(config, tied=tensor_numbers(problem))
        start = origin_of(problem)
        self._whole = whole
        tied = _TiedTrials(self._tied_trials(problem.budget))
        self._tied = tied
        super().__init__(
            problem,
            lambda n: _Refining(varied(config, n), start, steps, shares, tied),
            restarts_in_parallel,
        )

    def set_budget(self, budget: int) -> None:
        """Untie the chunks after the same part of another budget, unless it has been done."""
        if self._tied.left > 0:
            self._tied.left += self._tied_trials(budget) - self._tied.of
        self._tied.of = self._tied_trials(budget)

    def _tied_trials(self, budget: int) -> int:
        """Trials before the chunks are untied."""
        return max(int(self._whole * budget), 1)


@dataclass
class _TiedTrials:
    """How many trials of all walks are left until chunks are untied, and how many there were."""

    of: int
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.of


class _Refining(GradientWalk):
    """A walk that unties the chunks once all walks together have had so many trials."""

    def __init__(
        self, config: OptimizerConfig, start: Point, steps: int, shares: int, tied: _TiedTrials
    ) -> None:
        super().__init__(config, start, steps, shares)
        self._tied = tied

    def propose(self) -> WalkStep | None:
        """The next trial, after untying the chunks when it is time and no share is outstanding."""
        if self._tied.left <= 0 and not self._given and self.config.tied is not None:
            self.config = replace(self.config, tied=None)
            self.state = init_state(self.config, self.point)
        return super().propose()

    def learn(self, step: WalkStep, result: TrialResult) -> None:
        """Learn, and count the trial."""
        super().learn(step, result)
        self._tied.left -= 1


def tensor_numbers(problem: Problem) -> npt.NDArray[np.intp]:
    """Number of the tensor's coefficient that each coordinate is part of ``(dim,)``.

    Without chunks every coordinate has a number of its own.
    """
    space = problem.space
    if not isinstance(space, CoefficientSpace) or space.curves:
        return np.arange(problem.dim)
    labels = [group.tensors for index, group in enumerate(space.groups) if index not in space.held]
    numbers = np.unique([" ".join(tensors) for tensors in labels], return_inverse=True)[1]
    return np.concatenate(
        [numbers + row * len(labels) for row in range(problem.dim // len(labels))]
    )
