"""The rule behind ``strategy: auto``.

One objective: gradients of a smooth loss and then a surrogate, where the evaluators offer such a
loss; elsewhere a quadratic surrogate beside CMA-ES in up to 512 dimensions, if the budget holds a
trial for each, and CMA-ES otherwise. Several objectives: MAP's surrogates up to 256 dimensions, if
the budget holds a trial for each; otherwise NSGA-III for four objectives or more, SMS-EMOA for two
and three. It never chooses a strategy that searches a space of another kind. Why these:
``docs/decisions/0011-auto.md``.
"""

from __future__ import annotations

#: Above this dimension a quadratic model of one noisy objective costs too much.
QUADRATIC_LIMIT = 512
#: Above this one MAP refuses.
MAP_LIMIT = 256


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
    enough = budget is None or budget >= dim
    if objectives == 1:
        return "quadratic" if dim <= QUADRATIC_LIMIT and enough else "cma_es"
    if dim <= MAP_LIMIT and enough:
        return "map"
    return "sms_emoa" if objectives < 4 else "nsga3"
