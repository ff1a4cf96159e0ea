"""Expert Merging: coefficients that align the merged model with each expert on unlabelled items.

Zhang 2025, "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided
Layer Chunking" (arXiv 2509.25712). One coefficient per tensor and expert, as the logistic function
of what AdamW moves (learning rate 0.5, warm restarts), follows the evaluators' alignment loss plus
γ times the mean distance of an expert's coefficients from where they began, summed over experts.
What we changed:

* A step averages one batch of every domain. The authors take five items of each and accumulate
  eight samples, which with four domains is ``samples: 5, batch_size: 2``; that may do for language
  models, where an item has many answers. With one answer for an item it does not
  (experiments/0005-gradients), so all search items are used by default.
* γ = 0.8, the smaller of the authors' two values; 5 is the other.
* The gradient of the distance is zero at the start itself, to the rounding of the logistic
  function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field as Bound

from mergesearch.evaluators import Batch
from mergesearch.search.strategies.adamerging import origin_of
from mergesearch.search.strategies.base import Problem
from mergesearch.search.strategies.parts.gradient_walks import (
    GradientWalk,
    ParallelWalks,
    followed,
    varied,
)
from mergesearch.search.workers.gradient_steps import OptimizerConfig


class ExpertMerging(ParallelWalks):
    """AdamW on the logits of the coefficients, pulled to where they began.

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
        objectives: list[str] | None = None,
        shares: Annotated[int, Bound(ge=1)] = 1,
        restarts_in_parallel: Annotated[int, Bound(ge=1)] | None = None,
    ) -> None:
        config = config_of(
            problem, seed, learning_rate, batch_size, samples, gamma, period, objectives
        )
        start = origin_of(problem)
        super().__init__(
            problem,
            lambda n: GradientWalk(varied(config, n), start, steps, shares),
            restarts_in_parallel,
        )


def config_of(
    problem: Problem,
    seed: int,
    learning_rate: float,
    batch_size: int,
    samples: int,
    gamma: float,
    period: int,
    objectives: Sequence[str] | None,
) -> OptimizerConfig:
    """The optimizer's configuration; the arguments are options of :class:`ExpertMerging`."""
    return OptimizerConfig(
        problem.lower,
        problem.upper,
        origin_of(problem),
        followed(problem, objectives, "expert_merging"),
        optimizer="adamw",
        learning_rate=learning_rate,
        weight_decay=1e-5,
        clip=1.0,
        period=period,
        coordinates="logit",
        # γ R, R(α) = Σ |α − α_init| / (number of coefficients per expert)
        l1_to_start=gamma / max(problem.dim / directions_of(problem), 1.0),
        batch=Batch(size=batch_size or None, samples=samples or None, seed=seed),
    )


def directions_of(problem: Problem) -> int:
    """Rows of coefficients that the box holds: the experts of a merge, or 1."""
    space = problem.space
    return (
        1 if space is None or getattr(space, "shared", False) else getattr(space, "directions", 1)
    )
