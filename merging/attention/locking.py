"""Heads of a model under random maps that cancel: the same function, far from its relatives."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mergesearch.merging.attention.head_maps import Freedom, Maps
from mergesearch.merging.attention.heads import Attention
from mergesearch.merging.attention.random_maps import random_maps
from mergesearch.merging.attention.realigning import KEPT, MappedHeads


def locked_heads(
    attentions: Sequence[tuple[Attention, tuple[Freedom, ...]]], seed: int
) -> MappedHeads:
    """Heads under maps that a seed tells.

    Args:
        attentions: With the pairs that are mapped.
        seed: Of the maps; each attention and pair has a generator of its own.
    """

    @lru_cache(maxsize=KEPT)
    def maps(place: int) -> Maps:
        attention, free = attentions[place]
        counts = attention.counts
        return {
            one.pair: random_maps(
                one,
                counts.groups,
                counts.width,
                np.random.default_rng([seed, zlib.crc32(f"{attention.where}{one.pair}".encode())]),
            )
            for one in free
        }

    return MappedHeads(attentions, maps)
