"""SMS-EMOA: survival by dominance, then by the volume that a member alone covers.

Beume 2007, "SMS-EMOA: Multiobjective Selection Based on Dominated Hypervolume", operators and
survival from pymoo. The paper's algorithm has a steady state already
(:mod:`mergesearch.search.strategies.parts.evolution`): one child, one leaves.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field as Bound

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Problem
from mergesearch.search.strategies.parts.evolution import Evolution, Parts, default_population

#: Volumes of a population take 6 ms with this many objectives, ten times as long with every further
#: one.
MOST_OBJECTIVES = 6


class SmsEmoa(Evolution):
    """SMS-EMOA, which is a steady-state algorithm by itself.

    Args:
        problem: The box, the anchors and how losses scale.
        seed: Seed of the strategy's generator.
        population: Members; default 40, a fifth of the budget where that is less.
        sigma: Spread of the first population as a fraction of the range; default 0.2, less above
            ten dimensions.

    Raises:
        InputError: If there is one objective only, or more than six.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        population: Annotated[int, Bound(ge=4, le=100)] | None = None,
        sigma: Annotated[float, Bound(gt=0, le=1)] | None = None,
    ) -> None:
        if not 2 <= problem.objectives <= MOST_OBJECTIVES:
            other = "nsga2" if problem.objectives < 2 else "nsga3"
            allowed = f"expected 2 to {MOST_OBJECTIVES} objectives for sms_emoa"
            raise InputError(
                f"strategy.name: {allowed}, received {problem.objectives}; choose {other}"
            )
        from pymoo.algorithms.moo.sms import (
            LeastHypervolumeContributionSurvival,
            cv_and_dom_tournament,
        )

        survival = LeastHypervolumeContributionSurvival()

        def survive(pop: Any, n_survive: int, **arguments: Any) -> Any:
            # Bounds of the members without the newcomer, which comes last: an outlier must not
            # squeeze the others.
            losses = pop[:-1].get("F") if len(pop) > 1 else pop.get("F")
            ideal = losses.min(axis=0)
            nadir = losses.max(axis=0) + 1e-32
            return survival.do(pop=pop, n_survive=n_survive, ideal=ideal, nadir=nadir, **arguments)

        parts = Parts(cv_and_dom_tournament, {"eta": 15, "prob": 0.9}, survive)
        size = population or default_population(problem.budget)
        super().__init__(problem, np.random.default_rng(seed), parts, size, sigma)
        self._by_budget = population is None

    def set_budget(self, budget: int) -> None:
        """Let the default population grow with the budget."""
        if self._by_budget:
            self.keep_at_least(default_population(budget))
