"""Ratios, ranks and their uncertainty, from scores of contestants in cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: Within this factor of the best of a cell counts as near it.
NEAR = 1.1
RESAMPLES = 1000

#: (contestant, cell) -> score of each seed ``(seeds,)``; smaller is better, and positive.
Scores = Mapping[tuple[str, str], Array]


@dataclass(frozen=True)
class Standing:
    """A contestant's row.

    Attributes:
        name: Who.
        cells: In how many cells it played.
        rank: Mean rank among those who played in its cells.
        ratio: Geometric mean of its ratios to the best of a cell.
        low, high: 95 % interval of the ratio, over seeds.
        worst: Its largest ratio.
        near: Share of its cells in which it is within 10 % of the best.
    """

    name: str
    cells: int
    rank: float
    ratio: float
    low: float
    high: float
    worst: float
    near: float


def ratios(means: Array) -> Array:
    """Ratios to the best of each cell, of means ``(..., contestants, cells)``; NaN: not played."""
    return np.asarray(means / np.nanmin(means, axis=-2, keepdims=True))


def ranks(means: Array) -> Array:
    """Ranks in each cell ``(contestants, cells)``, 1 the best, equal ones shared; NaN stays."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(means, axis=0, nan_policy="omit"))


def standings(scores: Scores, rng: np.random.Generator) -> list[Standing]:
    """Rows by mean rank.

    Args:
        scores: Of every match.
        rng: For the bootstrap over seeds, which are drawn alike for all contestants.
    """
    names, _cells, logs = _stacked(scores)
    means = np.exp(logs.mean(axis=2))
    exact = ratios(means)
    placed = np.nanmean(ranks(means), axis=1)
    seeds = logs.shape[2]
    drawn = rng.integers(seeds, size=(RESAMPLES, seeds))
    again = np.array([ratios(np.exp(logs[:, :, rows].mean(axis=2))) for rows in drawn])
    spread = np.nanpercentile(np.exp(np.nanmean(np.log(again), axis=2)), [2.5, 97.5], axis=0)
    rows = [
        Standing(
            name,
            int(np.isfinite(exact[row]).sum()),
            float(placed[row]),
            float(np.exp(np.nanmean(np.log(exact[row])))),
            float(spread[0, row]),
            float(spread[1, row]),
            float(np.nanmax(exact[row])),
            float(np.mean(exact[row][np.isfinite(exact[row])] <= NEAR)),
        )
        for row, name in enumerate(names)
    ]
    return sorted(rows, key=lambda standing: standing.rank)


def cell_means(scores: Scores) -> tuple[list[str], list[str], Array]:
    """Contestants, cells, and geometric means over seeds ``(contestants, cells)``."""
    names, cells, logs = _stacked(scores)
    return names, cells, np.asarray(np.exp(logs.mean(axis=2)))


def critical_difference(contestants: int, cells: int) -> float:
    """Difference of mean ranks that is significant at 5 % (Nemenyi; Demšar 2006, eq. 4)."""
    from scipy.stats import studentized_range

    # CD = q sqrt(k (k + 1) / (6 N)), q the studentised range for infinite freedom over sqrt 2
    q = float(studentized_range.ppf(0.95, contestants, np.inf)) / np.sqrt(2.0)
    return float(q * np.sqrt(contestants * (contestants + 1) / (6.0 * cells)))


def friedman(means: Array) -> float:
    """p of the hypothesis that all contestants are equal, of means ``(contestants, cells)``."""
    from scipy.stats import friedmanchisquare

    return float(friedmanchisquare(*means).pvalue)


def _stacked(scores: Scores) -> tuple[list[str], list[str], Array]:
    """Contestants, cells, logarithms ``(contestants, cells, seeds)``; NaN: not played.

    Only seeds that every match has are used.
    """
    names = sorted({name for name, _ in scores})
    cells = _in_order([cell for _, cell in scores])
    seeds = min(len(values) for values in scores.values())
    logs = np.full((len(names), len(cells), seeds), np.nan)
    for (name, cell), values in scores.items():
        logs[names.index(name), cells.index(cell)] = np.log(values[:seeds])
    return names, cells, logs


def _in_order(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))
