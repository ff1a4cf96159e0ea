"""NSGA-II: survival by dominance, then by crowding.

Deb 2002, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", operators and survival
from pymoo. Driven one result at a time (:mod:`mergesearch.search.strategies.parts.evolution`). With
one objective, dominance is order, and it is a plain genetic algorithm.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated

import numpy as np
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Problem
from mergesearch.search.strategies.parts.evolution import Evolution, Parts, default_population


class Nsga2(Evolution):
    """Steady-state NSGA-II.

    Args:
        problem: The box, the anchors and how losses scale.
        seed: Seed of the strategy's generator.
        population: Members; default 40, a fifth of the budget where that is less.
        sigma: Spread of the first population as a fraction of the range; default 0.2, less above
            ten dimensions.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        population: Annotated[int, Bound(ge=4)] | None = None,
        sigma: Annotated[float, Bound(gt=0, le=1)] | None = None,
    ) -> None:
        from pymoo.algorithms.moo.nsga2 import binary_tournament
        from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

        rng = np.random.default_rng(seed)
        # Sec. III-B: dominance decides a tournament, crowding a tie.
        algorithm = SimpleNamespace(tournament_type="comp_by_dom_and_crowding", random_state=rng)
        parts = Parts(
            binary_tournament,
            {"eta": 15, "prob": 0.9},
            RankAndCrowding().do,
            context={"algorithm": algorithm},
        )
        super().__init__(
            problem, rng, parts, population or default_population(problem.budget), sigma
        )
        self._by_budget = population is None

    def set_budget(self, budget: int) -> None:
        """Let the default population grow with the budget."""
        if self._by_budget:
            self.keep_at_least(default_population(budget))
