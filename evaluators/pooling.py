"""Metrics that are made of all items of a domain together, such as F1 scores and correlations.

An evaluator scores their parts item by item: scores named ``metric/part``. Standard errors are
those of a jackknife that leaves out one of some groups of items at a time (Efron 1982, "The
Jackknife, the Bootstrap and Other Resampling Plans"), equation (3.1) for groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.reduction import DomainScore, score_domains

Array = npt.NDArray[np.float64]
#: The parts of a metric, each ``(items,)`` -> its value.
Pool = Callable[[Sequence[Array]], float]

#: Groups of items, one of which is left out at a time.
GROUPS = 20


def is_part(name: str) -> bool:
    """Whether a score is a part of a pooled metric."""
    return "/" in name


def pooled_domains(
    metric: str,
    pool: Pool,
    scores: Mapping[str, Array],
    indices: npt.NDArray[np.intp],
    domains: npt.NDArray[np.str_],
) -> dict[str, DomainScore]:
    """Domain -> value of a pooled metric, with its error.

    Args:
        metric: Its name; a score of that name is each item's own, else the first part is.
        pool: Computes the value from the parts.
        scores: Name -> score of each item ``(items,)``.
        indices: Indices of the items in the split ``(items,)``.
        domains: Domain of each item ``(items,)``.
    """
    parts = [values for name, values in scores.items() if name.startswith(f"{metric}/")]
    own = score_domains(scores.get(metric, parts[0]), domains)
    found = {}
    for name, score in own.items():
        rows = score.item_indices
        chosen = [part[rows] for part in parts]
        found[name] = replace(
            score,
            value=pool(chosen),
            error=jackknife_error(pool, chosen),
            item_indices=indices[rows],
            mean=False,
        )
    return found


def jackknife_error(pool: Pool, parts: Sequence[Array]) -> float:
    """Standard error of a value from its values without one group of the items each."""
    count = len(parts[0])
    groups = min(GROUPS, count)
    if groups < 2:
        return 0.0
    member = np.arange(count) % groups
    values = np.array([pool([part[member != left] for part in parts]) for left in range(groups)])
    spread = float(((values - values.mean()) ** 2).sum())
    return float(np.sqrt((groups - 1) / groups * spread))
