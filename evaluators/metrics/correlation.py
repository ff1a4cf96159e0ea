"""Spearman's and Pearson's correlation of answers with numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def spearman(parts: Sequence[Array]) -> float:
    """Rank correlation of answers and numbers, both ``(items,)``; 0 where one is constant."""
    from scipy.stats import rankdata

    return pearson([rankdata(part) for part in parts])


def pearson(parts: Sequence[Array]) -> float:
    """Linear correlation of answers and numbers, both ``(items,)``; 0 where one is constant."""
    answers, numbers = parts
    if not np.isfinite(answers).all():
        return float("nan")
    if np.ptp(answers) == 0 or np.ptp(numbers) == 0:
        return 0.0
    return float(np.corrcoef(answers, numbers)[0, 1])
