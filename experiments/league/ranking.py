"""Ratios, ranks and their uncertainty, from scores of contestants in cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.str_]

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
        rank_among_rivals, near_rivals: The rank, and the share, without its twins.
    """

    name: str
    cells: int
    rank: float
    ratio: float
    low: float
    high: float
    worst: float
    near: float
    rank_among_rivals: float
    near_rivals: float


def ratios(means: Array) -> Array:
    """Ratios to the best of each cell, of means ``(..., contestants, cells)``; NaN: not played."""
    return np.asarray(means / np.nanmin(means, axis=-2, keepdims=True))


def ranks(means: Array) -> Array:
    """Ranks in each cell ``(contestants, cells)``, 1 the best, equal ones shared; NaN stays."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(means, axis=0, nan_policy="omit"))


def rivalry(means: Array, codes: Codes) -> tuple[Array, Array]:
    """Ranks, and ratios to the best rival, in each cell; both ``(contestants, cells)``.

    Whoever runs the same code as a contestant is a twin of it: neither its rank nor the best rival
    counts twins.

    Args:
        means: Scores ``(contestants, cells)``; NaN: not played.
        codes: What each contestant runs in each cell ``(contestants, cells)``.
    """
    twins = codes[:, None] == codes
    rivals = np.where(twins, np.nan, means)
    own = means[:, None]
    # As in :func:`ranks`, equal ones share a rank.
    places = 1.0 + np.sum(rivals < own, axis=1) + 0.5 * np.sum(rivals == own, axis=1)
    best = np.min(np.where(np.isfinite(rivals), rivals, np.inf), axis=1)
    return np.where(np.isfinite(means), places, np.nan), np.asarray(means / best)


def standings(
    scores: Scores, rng: np.random.Generator, codes: Mapping[tuple[str, str], str] | None = None
) -> list[Standing]:
    """Rows by mean rank.

    Args:
        scores: Of every match.
        rng: For the bootstrap over seeds, which are drawn alike for all contestants.
        codes: (contestant, cell) -> what it runs there, where that is not the contestant's name.
    """
    names, cells, logs = _stacked(scores)
    means = np.exp(logs.mean(axis=2))
    run = [[(codes or {}).get((name, cell), name) for cell in cells] for name in names]
    alone, to_rivals = rivalry(means, np.array(run))
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
            _share_near(exact[row]),
            float(np.nanmean(alone[row])),
            _share_near(to_rivals[row]),
        )
        for row, name in enumerate(names)
    ]
    return sorted(rows, key=lambda standing: standing.rank)


def _share_near(found: Array) -> float:
    """Share of ratios ``(cells,)`` within 10 % of 1 or below it; NaN: not played."""
    return float(np.mean(found[np.isfinite(found)] <= NEAR))


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
