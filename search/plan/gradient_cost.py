"""What gradient steps cost beside the trials that take them, known before weights are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mergesearch.search.front import Normaliser
from mergesearch.search.plan.plan import Plan
from mergesearch.search.strategies.table import build_strategy, check_options
from mergesearch.search.workers.gradient_steps import GRADIENT_COST


@dataclass(frozen=True)
class GradientCost:
    """The cost of the first trial with gradient steps.

    Attributes:
        steps: Batches whose gradients are taken.
        items: Items of all batches together.
        evaluations: What they count in the budget, in evaluations of items.
        trial: Evaluations of the trial itself.
        share: Part of the budget that such trials may cost; None where nothing limits them.
    """

    steps: int
    items: int
    evaluations: int
    trial: int
    share: float | None

    @property
    def sentence(self) -> str:
        """The cost in words."""
        limit = "" if self.share is None else f"; at most {self.share:.0%} of the budget go there"
        return (
            f"{self.steps} steps after the first trial read {self.items:,} items, which count as "
            f"{self.evaluations:,} evaluations beside its {self.trial:,} (a gradient counts "
            f"{GRADIENT_COST}, and takes about as long){limit}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The cost as JSON."""
        return asdict(self)


def gradient_cost(plan: Plan) -> GradientCost | None:
    """The cost of a study's gradient steps; None with a strategy that takes none at first."""
    if plan.differentiable_space is None or plan.undecided:
        return None
    count = len(plan.objectives)
    normaliser = Normaliser(np.zeros(count), np.ones(count))
    problem = plan.problem(normaliser, plan.search_trials or 1000, plan.space.start)
    options = check_options(plan.entry.name, plan.strategy.options)
    strategy = build_strategy(plan.entry.name, options, problem, plan.spec.seed)
    steps = strategy.ask(1)[0].gradient_steps
    if steps is None:
        return None
    config = steps.config
    items = steps.batches * plan.evaluator.batch_cost(config.batch, [*config.weights])
    share = plan.entry.options().get("share")
    given = plan.strategy.options.get("share", None if share is None else share.default)
    return GradientCost(
        steps.batches, items, GRADIENT_COST * items, plan.evaluator.cost("search"), given
    )
