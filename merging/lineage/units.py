"""Hidden units in another order: permuted twins, found by matching columns of sampled rows.

A permutation of hidden units moves the columns of the matrix that reads them, and nothing else in
its rows (Ainsworth et al., "Git Re-Basin", ICLR 2023, section 2). Each column, restricted to some
rows, is the signature of its unit: the best match of a base's unit among the expert's tells where
it went. Cosines are compared, so that units with other scales are found too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergesearch.merging.lineage.rows import Rows

#: Units of the base that are looked for.
QUERIES = 128
#: Cosine of best matches from which units count as the same.
SAME_UNIT = 0.9
#: Share of the way from what chance matches give to a perfect match that is needed beside it.
ABOVE_CHANCE = 0.5
#: Signatures must have as many numbers.
SHORTEST_SIGNATURE = 8


@dataclass(frozen=True)
class MovedUnits:
    """Where the units of a base were found in an expert.

    Attributes:
        name: The matrix that reads them.
        sampled: Units that were looked for.
        moved: Of these, the ones found in another place.
        cosine: Mean cosine of the matches.
    """

    name: str
    sampled: int
    moved: int
    cosine: float


def moved_units(
    name: str, base: Rows, expert: Rows, unit: int, generator: np.random.Generator
) -> MovedUnits | None:
    """The units of a base that stand in other places of an expert; None unless they are the same.

    Args:
        name: Of the matrix.
        base: Sampled rows of the base, ``(rows, units · unit)``.
        expert: The same rows of the expert.
        unit: Neighbouring columns that belong to one unit (the kernel of a convolution).
        generator: Chooses the units that are looked for.
    """
    ours = _signatures(base, unit)
    theirs = _signatures(expert, unit)
    if ours.shape[1] < SHORTEST_SIGNATURE or len(ours) < 2:
        return None
    sampled = np.sort(generator.choice(len(ours), size=min(QUERIES, len(ours)), replace=False))
    queries = ours[sampled]
    cosines = queries @ theirs.T
    best = cosines.argmax(axis=1)
    matched = float(cosines.max(axis=1).mean())
    chance = float((generator.permuted(queries, axis=1) @ theirs.T).max(axis=1).mean())
    distinct = len(np.unique(best)) / len(best)
    moved = int((best != sampled).sum())
    needed = max(SAME_UNIT, chance + ABOVE_CHANCE * (1 - chance))
    if matched < needed or distinct < SAME_UNIT or 2 * moved < len(sampled):
        return None
    return MovedUnits(name, len(sampled), moved, matched)


def _signatures(rows: Rows, unit: int) -> Rows:
    """One row of unit length for each unit, ``(units, rows · unit)``; zero where it is zero."""
    count, columns = rows.shape
    split = rows.reshape(count, columns // unit, unit).transpose(1, 0, 2).reshape(-1, count * unit)
    lengths = np.linalg.norm(split, axis=1, keepdims=True)
    return np.asarray(split / np.where(lengths > 0, lengths, 1))
