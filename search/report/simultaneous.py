"""Simultaneous intervals: one critical value for all comparisons that a report makes at once.

A winner is compared with every anchor, in every objective. Intervals that hold one by one would
miss the truth somewhere far more often than in 5 % of studies, and so would the interval against
the anchor that looks best, because noise has a say in which one that is. These hold all together
in 95 % (Dunnett 1955, "A Multiple Comparison Procedure for Comparing Several Treatments with a
Control"; Hothorn, Bretz and Westfall 2008, "Simultaneous Inference in General Parametric Models",
section 3): each reaches as many standard errors as the largest of all deviations does in 95 % of
draws from their joint distribution. Its correlations come from the scores of the items, by
Gaussian multipliers (van der Vaart and Wellner 1996, section 2.9); its tails are those of Student's
t. Deviations whose correlation is not known count as independent, which can only make the
intervals wider (Royen 2014, "A simple proof of the Gaussian correlation conjecture").

A value that is no weighted sum of items (a worst domain, a perplexity, an F1 score) has no share of
its own for each item. It was worked out on resamples of the items, the same for all merges, when it
was measured; the error of a difference is its spread over these (Efron 1979, "Bootstrap methods:
another look at the jackknife").
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.search.record.trial_record import Score

Array = npt.NDArray[np.float64]

#: Draws behind a critical value; its level is then known to 0.15 points.
DRAWS = 20_000


@dataclass(frozen=True, eq=False)
class Deviation:
    """The sampling error of one comparison.

    Attributes:
        error: Its standard error; 0 where both always score the same.
        items: What each item adds to it ``(items,)``, or each resample of the items, summing to 0;
            None where only the standard error is known.
        freedom: Degrees of freedom of the error; None for one less than ``items``.
    """

    error: float
    items: Array | None = None
    freedom: int | None = None

    @property
    def paired(self) -> bool:
        """Whether it comes from item-by-item differences."""
        return self.items is not None


def interval_around(
    difference: float, deviation: Deviation | None, width: float
) -> tuple[float | None, float | None]:
    """A difference less and plus ``width`` standard errors; None twice where none is known."""
    if deviation is None:
        return None, None
    half = width * deviation.error
    return difference - half, difference + half


def paired_deviation(differences: Array, weights: Array | None = None) -> Deviation:
    """The sampling error of ``Σ weight · difference``.

    Items of equal weight are taken for the sample of one domain, so the weights' own spread does
    not count. Differences that are -1, 0 or 1 get half an item more on either side, without which
    a handful of items that all favour one merge would look certain (Agresti and Min 2005, "Simple
    improved confidence intervals for comparing matched proportions").

    Args:
        differences: Score of one merge less that of the other on each item ``(items,)``.
        weights: Weight of each item ``(items,)``; None weighs all alike.
    """
    share = np.full(len(differences), 1 / len(differences)) if weights is None else weights
    parts = np.zeros(len(differences))
    for weight in np.unique(share):
        rows = np.flatnonzero(share == weight)
        sample = differences[rows]
        freedom = len(rows) / max(len(rows) - 1, 1)
        parts[rows] = weight * math.sqrt(freedom) * (sample - sample.mean())
    variance = float(parts @ parts)
    if np.isin(differences, (-1.0, 0.0, 1.0)).all():
        variance += float(share.max() ** 2)
    return Deviation(math.sqrt(variance), parts)


def resampled_deviation(differences: Array, items: int) -> Deviation:
    """The sampling error of a difference by its values on resamples of the items.

    Args:
        differences: Value of one merge less that of the other on each resample ``(resamples,)``.
        items: Number of items that were resampled.
    """
    parts = (differences - differences.mean()) / math.sqrt(len(differences) - 1)
    return Deviation(float(np.linalg.norm(parts)), parts, freedom=max(items - 1, 1))


def deviation_of(name: str, ours: Score, theirs: Score) -> Deviation | None:
    """The sampling error of our value less theirs in one objective; None where it is not known.

    It is paired where items explain the values, or where both are known on the same resamples.
    """
    difference = ours.values[name] - theirs.values[name]
    size = max(abs(ours.values[name]), 1.0)
    items = ours.items.get(name)
    others = theirs.items.get(name)
    if items is not None and others is not None and len(items) == len(others) > 1:
        weights = ours.weights.get(name)
        gaps = items - others
        mean = gaps.mean() if weights is None else weights @ gaps
        # Logs keep items in single precision.
        if math.isclose(mean, difference, abs_tol=1e-5 * size) and name not in ours.resampled:
            return paired_deviation(gaps, weights)
    drawn = ours.resampled.get(name)
    rivals = theirs.resampled.get(name)
    if drawn is not None and rivals is not None and len(drawn) == len(rivals):
        count = min(len(each) for each in (items, others, drawn) if each is not None)
        return resampled_deviation(drawn - rivals, count)
    if name not in ours.errors or name not in theirs.errors:
        return None
    return Deviation(math.hypot(ours.errors[name], theirs.errors[name]))


def critical_value(deviations: Sequence[Deviation], level: float = 0.95, seed: int = 0) -> float:
    """Standard errors that intervals of all deviations must reach to hold together.

    Args:
        deviations: Of all comparisons; those without spread are always met and do not count.
        level: Probability that all intervals hold.
        seed: Seeds the draws, so that a report says the same each time.
    """
    generator = np.random.default_rng(seed)
    largest = np.zeros(DRAWS)
    for block in _blocks([each for each in deviations if each.error > 0]):
        np.maximum(largest, _largest(block, generator), out=largest)
    return float(np.quantile(largest, level))


def _blocks(deviations: Sequence[Deviation]) -> list[list[Deviation]]:
    """Deviations that share their items together, the others one by one."""
    shared: dict[tuple[int, bool], list[Deviation]] = defaultdict(list)
    alone = []
    for deviation in deviations:
        if deviation.items is None or not deviation.items.any():
            alone.append([deviation])
        else:
            shared[len(deviation.items), deviation.freedom is None].append(deviation)
    return [*shared.values(), *alone]


def _largest(block: Sequence[Deviation], generator: np.random.Generator) -> Array:
    """Draws of the largest size of a block's deviations, in standard errors ``(draws,)``."""
    parts = [each.items for each in block if each.items is not None]
    if len(parts) < len(block) or not parts[0].any():
        return np.asarray(np.abs(generator.standard_normal(DRAWS)))
    rows = np.stack(parts)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    # Σ multiplier · row has the covariance rows · rowsᵀ, whose root draws the same with less.
    values, vectors = np.linalg.eigh(rows @ rows.T)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    normal = generator.standard_normal((DRAWS, len(values))) @ root.T
    freedom = min(each.freedom or rows.shape[1] - 1 for each in block)
    spread = np.sqrt(generator.chisquare(freedom, DRAWS) / freedom)
    return np.asarray(np.abs(normal).max(axis=1) / spread)
