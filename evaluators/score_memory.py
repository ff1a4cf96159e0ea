"""A candidate's scores so far, so that a larger part of the items scores only what is new."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


def scores_at(
    memory: dict[Any, Any],
    key: Any,
    indices: Indices,
    score: Callable[[Indices], Mapping[str, Array]],
) -> dict[str, Array]:
    """Metric -> scores ``(n,)`` of the items at ``indices``.

    Args:
        memory: The candidate's ``scored``; what is scored now is added to it.
        key: The evaluator and the split that the scores belong to.
        indices: Which items of the split ``(n,)``, rising.
        score: Indices ``(m,)``, rising -> metric -> scores ``(m,)``; called for new items only.
    """
    before, scores = memory.get(key, (np.empty(0, np.intp), {}))
    fresh = np.setdiff1d(indices, before)
    if fresh.size:
        merged = np.concatenate([before, fresh])
        order = np.argsort(merged)
        scores = {
            metric: np.concatenate([scores[metric], new] if metric in scores else [new])[order]
            for metric, new in score(fresh).items()
        }
        before = merged[order]
        memory[key] = before, scores
    rows = np.searchsorted(before, indices)
    return {metric: values[rows] for metric, values in scores.items()}
