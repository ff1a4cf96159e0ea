"""The rule behind ``strategy: auto``.

One objective: gradients of a smooth loss and then a surrogate, where the evaluators offer such a
loss; elsewhere a quadratic surrogate beside CMA-ES in up to 512 dimensions, if the budget holds a
trial for each, and CMA-ES otherwise. Several objectives: MAP's surrogates up to 64 dimensions, if
the budget holds the points that a model of the curvature in each coordinate needs; otherwise
NSGA-III for four objectives or more, SMS-EMOA for two and three. It never chooses a strategy that
searches a space of another kind. Why these: ``docs/decisions/0011-auto.md``.
"""

from __future__ import annotations

#: Above this dimension a quadratic model of one noisy objective costs too much.
QUADRATIC_LIMIT = 512
MAP_LIMIT = 64


def choose_unrecorded(dim: int, objectives: int, budget: int | None) -> str:
    """Name of the strategy that ``auto`` stood for before runs recorded it: the rule of then.

    Arguments are those of :func:`choose`.
    """
    if objectives == 1:
        return "quadratic" if dim <= 32 else "cma_es"
    if dim <= 64 and (budget is None or budget >= 2 * (2 * dim + 1)):
        return "map"
    return "sms_emoa" if objectives < 4 else "nsga3"


def choose(dim: int, objectives: int, budget: int | None, *, gradients: bool = False) -> str:
    """Name of the strategy for a problem.

    Args:
        dim: Number of coordinates.
        objectives: Number of losses.
        budget: Trials; None: unknown.
        gradients: Whether a loss with gradients is offered.
    """
    if objectives == 1 and gradients:
        return "hybrid"
    if objectives == 1:
        enough = budget is None or budget >= dim
        return "quadratic" if dim <= QUADRATIC_LIMIT and enough else "cma_es"
    if dim <= MAP_LIMIT and (budget is None or budget >= 2 * (2 * dim + 1)):
        return "map"
    return "sms_emoa" if objectives < 4 else "nsga3"
