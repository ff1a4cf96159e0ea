"""NSGA-III: survival by dominance, then by the reference direction with the fewest members.

Deb 2014, "An Evolutionary Many-Objective Optimization Algorithm Using Reference-Point-Based
Nondominated Sorting Approach, Part I", operators and survival from pymoo. Driven one result at a
time (:mod:`mergesearch.search.strategies.parts.evolution`).
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from pydantic import Field as Bound

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point, Problem
from mergesearch.search.strategies.parts.evolution import Evolution, Parts, default_population


class Nsga3(Evolution):
    """Steady-state NSGA-III.

    Args:
        problem: The box, the anchors and how losses scale.
        seed: Seed of the strategy's generator.
        population: Members; default 40, a fifth of the budget where that is less. There are as many
            reference directions as fit, and at least one for each objective: with many objectives,
            members increase to that.
        sigma: Spread of the first population as a fraction of the range; default 0.2, less above
            ten dimensions.

    Raises:
        InputError: If there is one objective only.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        population: Annotated[int, Bound(ge=4)] | None = None,
        sigma: Annotated[float, Bound(gt=0, le=1)] | None = None,
    ) -> None:
        if problem.objectives < 2:
            raise InputError(
                "strategy.name: expected two objectives or more for nsga3, received 1; choose nsga2"
            )
        from pymoo.algorithms.moo.nsga3 import ReferenceDirectionSurvival, comp_by_cv_then_random

        size = population or default_population(problem.budget)
        directions = reference_directions(problem.objectives, size)
        # Sec. IV-F: parents are drawn at random, and children stay near them (eta 30).
        parts = Parts(
            comp_by_cv_then_random,
            {"eta": 30, "prob": 1.0},
            ReferenceDirectionSurvival(directions).do,
        )
        super().__init__(
            problem, np.random.default_rng(seed), parts, max(size, len(directions)), sigma
        )


def reference_directions(objectives: int, most: int) -> Point:
    """Evenly spaced points of the simplex ``(directions, objectives)``, about ``most`` (sec. IV-B).

    A single layer with fewer parts than objectives has no inner points; a second layer, halfway to
    the centre, adds them (sec. V, table I).
    """
    from pymoo.util.ref_dirs import get_reference_directions

    outer = _parts(objectives, most)
    points: Point = get_reference_directions("das-dennis", objectives, n_partitions=outer)
    if outer >= objectives:
        return points
    inner = get_reference_directions(
        "das-dennis", objectives, n_partitions=_parts(objectives, most - len(points))
    )
    return np.vstack([points, 0.5 * inner + 0.5 / objectives])


def _parts(objectives: int, most: int) -> int:
    """Parts of each edge of the simplex that give at most ``most`` points; at least 1."""
    parts = 1
    while math.comb(parts + objectives, objectives - 1) <= most:
        parts += 1
    return parts
