"""Tokens of two tokenizers on one text, paired.

FuseLLM pairs whole sequences by dynamic programming over edit distances. Here the sequences are cut
first wherever both have the end of a token, which offsets tell exactly; the programme then runs
within pieces of a few tokens, so that a text costs time in proportion to its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.merging.distillation.tokenized import Tokenized


@dataclass(frozen=True)
class Piece:
    """Tokens of both sides that cover the same characters, and no part of which does.

    Attributes:
        ours: Range of the pivot's tokens.
        theirs: Range of the source's.
    """

    ours: range
    theirs: range

    @property
    def single(self) -> bool:
        """Whether one token stands on each side."""
        return len(self.ours) == len(self.theirs) == 1


def pieces(ours: Sequence[int], theirs: Sequence[int]) -> list[Piece]:
    """The pieces of a text, in its order.

    Tokens of white space alone belong to none, for the other side may have it in its words. What
    one side alone has at its end is left out.

    Args:
        ours: End of every token of one side, never falling.
        theirs: The same of the other side.
    """
    found = []
    start = (_written(ours, 0, 0), _written(theirs, 0, 0))
    i, j = start
    while i < len(ours) and j < len(theirs):
        if ours[i] == theirs[j]:
            found.append(Piece(range(start[0], i + 1), range(start[1], j + 1)))
            start = (_written(ours, i + 1, ours[i]), _written(theirs, j + 1, ours[i]))
            i, j = start
        elif ours[i] < theirs[j]:
            i += 1
        else:
            j += 1
    return found


def _written(ends: Sequence[int], at: int, end: int) -> int:
    """Index of the next token that is more than white space, after a piece that ends at ``end``."""
    while at < len(ends) and ends[at] == end:
        at += 1
    return at


def cheapest_path(costs: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pairs of a monotone path from the first to the last pair with the least sum of costs.

    Each step moves on in one of the sequences, or in both; both is taken where sums are equal.

    Args:
        costs: Of pairing each of ours with each of theirs ``(n, m)``, at least one each.
    """
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    for i in range(rows):
        for j in range(columns):
            total[i + 1, j + 1] = costs[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    path = []
    i, j = rows, columns
    while i and j:
        path.append((i - 1, j - 1))
        before = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        i, j = min(before, key=lambda at: float(total[at]))
    return path[::-1]


def token_pairs(
    found: Sequence[Piece],
    ours: Tokenized,
    theirs: Tokenized,
    distance: Callable[[int, int], float],
) -> list[tuple[int, int]]:
    """Ids of the paired tokens of a text, those of the source first.

    Args:
        found: The pieces of the text.
        ours, theirs: Its tokens.
        distance: Id of the pivot, id of the source -> edit distance of their texts.
    """
    pairs = []
    for piece in found:
        mine = ours.ids[piece.ours.start : piece.ours.stop].tolist()
        other = theirs.ids[piece.theirs.start : piece.theirs.stop].tolist()
        costs = np.array([[distance(one, two) for two in other] for one in mine])
        pairs += [(other[j], mine[i]) for i, j in cheapest_path(costs)]
    return pairs
