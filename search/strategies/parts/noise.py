"""What standard errors and the course of losses say about noise.

Levels are losses of successive batches of trials, the latest last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.search.strategies.base import TrialResult

Array = npt.NDArray[np.float64]

#: How far the newer half must lie below the older, in standard deviations of the rank-sum
#: statistic.
TREND = 1.0
#: Squared standard errors differ where one is so many times the least of the batch.
DIFFERENT = 2.0
#: Fewest updates that a recommendation averages, beside the latest alone, and the factor between
#: the numbers of updates that are tried.
LEAST_SETTLED = 4
SETTLED_GROWTH = 1.5


def fall(levels: Sequence[float]) -> float:
    """How far newer levels lie below older ones, in standard deviations of the rank sum.

    The halves of ``levels`` are compared.

    Mann and Whitney 1947, "On a Test of Whether one of Two Random Variables is Stochastically
    Larger than the Other".
    """
    half = len(levels) // 2
    # U = Σ [newer < older] + ½ Σ [newer = older]; its mean is h²/2, its variance h²(2h + 1)/12.
    older = np.array(levels[:half])[:, None]
    newer = np.array(levels[-half:])
    wins = np.sum(newer < older) + 0.5 * np.sum(newer == older)
    return float((wins - half**2 / 2) / math.sqrt(half**2 * (2 * half + 1) / 12))


def settled(levels: Sequence[float]) -> int:
    """Number of the latest levels, at most half of them, among which there is no fall; 1 if none.

    Beyond them the search still made progress, and means are worse.
    """
    count = 1
    longer = LEAST_SETTLED
    while longer <= len(levels) // 2 and fall(levels[-longer:]) < TREND:
        count = longer
        longer = int(SETTLED_GROWTH * longer)
    return count


def pooled(scores: Array, squares: Array) -> Array:
    """Scores ``(results,)`` as certain as the most certain of them; infinite ones stay so.

    ``s' = m + (s - m) v / (v + e² - min e²)``, the posterior mean where scores vary by ``v`` around
    their median ``m`` and ``e²`` is the squared standard error of one, NaN where it is not known.
    Errors that are nearly equal change nothing.
    """
    known = np.isfinite(scores)
    spread = float(np.var(scores[known])) if known.any() else 0.0
    if not spread or not np.isfinite(squares).any():
        return scores
    least = np.nanmin(squares)
    # Of whole results, the estimated errors themselves vary, and with the losses.
    excess = np.where(squares >= DIFFERENT * least, squares - least, 0.0)
    middle = np.median(scores[known])
    pulled = middle + (scores - middle) * spread / (spread + excess)
    return np.where(known & (excess > 0), pulled, scores)


def noise_share(scores: Array, squares: Array) -> float:
    """Share of known errors in the variance of a batch, at most 1; 0 where none is known."""
    known = np.isfinite(scores) & np.isfinite(squares)
    if np.sum(known) < 2:
        return 0.0
    noise = float(np.mean(squares[known]))
    return min(noise / max(float(np.var(scores[known])), noise), 1.0) if noise else 0.0


def squared_error(result: TrialResult, score: Callable[[Array], float]) -> float:
    """Squared standard error of a result's score, to first order; NaN where it is not known."""
    if result.losses is None or result.errors is None or not np.isfinite(result.errors).all():
        return math.nan
    here = score(result.losses)
    steps = result.losses + np.diag(result.errors)
    return float(sum((score(step) - here) ** 2 for step in steps))
