"""The rule behind ``strategy: auto``.

One objective: a quadratic surrogate beside CMA-ES in up to 32 dimensions, CMA-ES above. Several
objectives: MAP's surrogates up to 64 dimensions, if the budget holds the points that a model of the
curvature in each coordinate needs; otherwise NSGA-III for four objectives or more, SMS-EMOA for two
and three. It never chooses a strategy that searches a space of another kind. Why these:
``docs/decisions/0011-auto.md``.
"""

from __future__ import annotations

#: Above this dimension a quadratic model of one noisy objective no longer pays.
QUADRATIC_LIMIT = 32
MAP_LIMIT = 64


def choose(dim: int, objectives: int, budget: int | None) -> str:
    """Name of the strategy for a problem.

    Args:
        dim: Number of coordinates.
        objectives: Number of losses.
        budget: Trials; None: unknown.
    """
    if objectives == 1:
        return "quadratic" if dim <= QUADRATIC_LIMIT else "cma_es"
    if dim <= MAP_LIMIT and (budget is None or budget >= 2 * (2 * dim + 1)):
        return "map"
    return "sms_emoa" if objectives < 4 else "nsga3"
