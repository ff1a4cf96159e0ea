"""AdaMerging: gradients of the prediction entropy on unlabelled items move the coefficients.

Yang 2024, "AdaMerging: Adaptive Model Merging for Multi-Task Learning" (arXiv 2310.02575). Adam
with learning rate 1e-3 from 0.3 follows the mean prediction entropy of unlabelled items, one batch
of 16 of every task at each step. The space's granularity makes it task-, block- or tensor-wise (the
paper's "layer" is one tensor); with ``operator: ties`` it is AdaMerging++. What we changed:

* No graph goes through the merge: one backward pass gives the gradient of the weights, and its
  inner products with the basis are the gradients of all coefficients. Tasks run one after the
  other, so memory does not grow with their number.
* The authors clamp coefficients to [0, 1] in the forward pass, where the gradient of what lies
  outside is zero for ever. Here steps are projected onto the bounds, or taken in logits that never
  reach them.
* Items are those of the search, not of the test, unless the evaluator is told otherwise
  (``transductive``).
* It follows whatever the evaluators have gradients of: entropy, alignment to the experts, labelled
  cross-entropy.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field as Bound

from mergesearch.evaluators import Batch
from mergesearch.search.strategies.base import Point, Problem
from mergesearch.search.strategies.parts.gradient_walks import (
    GradientWalk,
    ParallelWalks,
    followed,
    varied,
)
from mergesearch.search.workers.gradient_steps import OptimizerConfig


class AdaMerging(ParallelWalks):
    """Adam on the coefficients.

    Args:
        problem: The box, and which objectives have gradients.
        seed: Shuffles the items.
        steps: Steps of each trial.
        learning_rate: Of Adam.
        batch_size: Items of every domain in a batch; 0 takes all of them.
        coordinates: ``box``: steps are clipped to the bounds; ``logit``: steps in logits that never
            reach them.
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
        steps: Annotated[int, Bound(ge=1)] = 25,
        learning_rate: Annotated[float, Bound(gt=0)] = 1e-3,
        batch_size: Annotated[int, Bound(ge=0)] = 16,
        coordinates: Literal["box", "logit"] = "box",
        objectives: list[str] | None = None,
        shares: Annotated[int, Bound(ge=1)] = 1,
        restarts_in_parallel: Annotated[int, Bound(ge=1)] | None = None,
    ) -> None:
        start = origin_of(problem)
        config = OptimizerConfig(
            problem.lower,
            problem.upper,
            start,
            followed(problem, objectives, "adamerging"),
            learning_rate=learning_rate,
            coordinates=coordinates,
            batch=Batch(size=batch_size or None, seed=seed),
        )
        super().__init__(
            problem,
            lambda n: GradientWalk(varied(config, n), start, steps, shares),
            restarts_in_parallel,
        )


def origin_of(problem: Problem) -> Point:
    """The start that the study names, whatever the anchors showed ``(dim,)``."""
    return problem.start if problem.origin is None else problem.origin
