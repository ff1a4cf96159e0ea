"""Which tokens of the pivot a token of a source stands for.

``edit`` takes the token whose text is nearest (FuseLLM's MinED); ``frequency`` the one that it was
most often paired with on the texts (FuseChat's statistics); ``starts`` all that began a piece of
text together with it, in proportion. What the texts do not tell of is mapped by edit distance.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

#: The most tokens of the pivot that one of the source is divided among.
MOST = 8


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Tokens of the pivot for every token of a source.

    Attributes:
        ids: Of the pivot ``(source tokens, at most MOST)``.
        shares: What part of the source's probability each gets, of the same shape; a row adds up to
            1, or to 0 where a token has no counterpart.
    """

    ids: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float32]


def count_pairs(pairs: Iterable[tuple[int, int]]) -> dict[int, Counter[int]]:
    """Token of the source -> how often each of the pivot's was paired with it."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for source, pivot in pairs:
        counts[source][pivot] += 1
    return dict(counts)


def most_frequent(counts: Counter[int]) -> dict[int, float]:
    """The most frequent partner alone; the smallest id among equals."""
    return {min(counts, key=lambda one: (-counts[one], one)): 1.0}


def in_proportion(counts: Counter[int]) -> dict[int, float]:
    """The ``MOST`` most frequent partners, in proportion."""
    kept = sorted(counts, key=lambda one: (-counts[one], one))[:MOST]
    total = sum(counts[one] for one in kept)
    return {one: counts[one] / total for one in kept}


def nearest_texts(wanted: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Index of the text with the least edit distance to each wanted one; the first among equals.

    Empty texts are no candidates; without any other, -1.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import extractOne

    exact: dict[str, int] = {}
    for index, text in enumerate(texts):
        exact.setdefault(text, index)
    listed = [text or None for text in texts]
    found = []
    for text in wanted:
        best = exact.get(text) if text else -1
        if best is None:
            match = extractOne(text, listed, scorer=Levenshtein.distance)
            best = -1 if match is None else int(match[2])
        found.append(best)
    return found


def token_map(
    rows: Mapping[int, Mapping[int, float]],
    needed: Iterable[int],
    theirs: Sequence[str],
    ours: Sequence[str],
    special: Mapping[int, int],
) -> TokenMap:
    """The map of a source's tokens.

    Args:
        rows: Token of the source -> tokens of the pivot and their shares, where texts tell.
        needed: Tokens of the source that are predicted; of these the others go to the nearest text.
        theirs: Text of each token of the source; "" for special ones.
        ours: Text of each token of the pivot.
        special: Special tokens of the source with a counterpart -> that of the pivot.
    """
    known = {one: {other: 1.0} for one, other in special.items()} | dict(rows)
    others = sorted({*needed} - known.keys())
    for one, best in zip(others, nearest_texts([theirs[n] for n in others], ours), strict=True):
        known[one] = {best: 1.0} if best >= 0 else {}
    width = max((len(row) for row in known.values()), default=1) or 1
    ids = np.zeros((len(theirs), width), dtype=np.int64)
    shares = np.zeros((len(theirs), width), dtype=np.float32)
    for one, row in known.items():
        ids[one, : len(row)] = list(row)
        shares[one, : len(row)] = list(row.values())
    return TokenMap(ids, shares)


def special_pairs(theirs: Any, ours: Any) -> dict[int, int]:
    """Special tokens of one tokenizer -> those of another with the same role."""
    roles = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
    pairs = [(getattr(theirs, role, None), getattr(ours, role, None)) for role in roles]
    return {int(one): int(two) for one, two in reversed(pairs) if None not in (one, two)}
