"""Whole chunks summed or elected by compiled code: all rows side by side, or a few at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from mergesearch.merging.kernels.chunks.columns import FIELDS
from mergesearch.merging.kernels.chunks.loops import (
    GOES_ON,
    WAITS,
    elect_natural,
    elect_pairs,
    sum_natural,
    sum_pairs,
)
from mergesearch.merging.kernels.chunks.stamp import stamped
from mergesearch.merging.kernels.numba_kernel import compiled

#: A sum of at least so many rows is made in parts. A processor fetches ahead of some 16 streams,
#: and its first-level cache holds eight lines whose addresses are equal modulo 4096, as those of
#: one position are in rows of whole pages.
MANY = 12

#: Rows of a part, at most.
GROUP = 8

#: Chunks for which a part is summed before the next begins; what they have come to (256 kB) waits
#: in the second-level cache.
PIECE = 1024

_AT = types.int64
_TERMS = types.Array(types.int64, 2, "C")
_SCALARS = types.Array(types.float32, 2, "C")
_LIST = types.Array(types.int64, 1, "C")


@compiled(types.void(_TERMS, _SCALARS, _AT, _LIST, *[_AT] * 5))
@stamped
def sum_in_parts(
    terms: Any,
    scalars: Any,
    count: int,
    masks: Any,
    first: int,
    last: int,
    out: int,
    kind: int,
    scratch: int,
) -> None:
    """Write chunks ``first:last`` of a sum: of all rows at once, or of some after the others.

    The additions are the same in the same order. Rows that share masks stay together.
    """
    group = count
    piece = last - first
    if count >= MANY and masks.size == 0:
        parts = -(-count // GROUP)
        group = -(-count // parts)
        piece = PIECE
    some = np.empty((1 + group, FIELDS), np.int64)
    numbers = np.empty((1 + group, 2), np.float32)
    some[0] = terms[0]
    numbers[0] = scalars[0]
    at = some.ctypes.data
    weights = numbers.ctypes.data
    all_masks = masks.ctypes.data
    k = masks.size
    pairs = terms[0, 0] == 1 or terms[0, 0] == 2  # 16 bits
    while first < last:
        end = min(first + piece, last)
        row = 0
        while row == 0 or row < count:
            n = min(group, count - row)
            some[1 : 1 + n] = terms[1 + row : 1 + row + n]
            numbers[1 : 1 + n] = scalars[1 + row : 1 + row + n]
            rule = (GOES_ON if row > 0 else 0) + (WAITS if row + n < count else 0)
            if pairs:
                sum_pairs(at, weights, n, all_masks, k, first, end, out, kind, rule, scratch)
            else:
                sum_natural(at, weights, n, all_masks, k, first, end, out, kind, rule, scratch)
            row += max(n, 1)
        first = end


@compiled(types.void(_TERMS, _SCALARS, _AT, _LIST, *[_AT] * 6))
@stamped
def sum_chunks(
    terms: Any,
    scalars: Any,
    count: int,
    masks: Any,
    first: int,
    last: int,
    out: int,
    kind: int,
    rule: int,
    scratch: int,
) -> None:
    """Write chunks ``first:last`` of base and ``count`` rows, summed or elected."""
    at = terms.ctypes.data
    numbers = scalars.ctypes.data
    all_masks = masks.ctypes.data
    k = masks.size
    pairs = terms[0, 0] == 1 or terms[0, 0] == 2  # 16 bits
    if rule == 0:
        sum_in_parts(terms, scalars, count, masks, first, last, out, kind, scratch)
    elif pairs:
        elect_pairs(at, numbers, count, all_masks, k, first, last, out, kind, rule, scratch)
    else:
        elect_natural(at, numbers, count, all_masks, k, first, last, out, kind, rule, scratch)
