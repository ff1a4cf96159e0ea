"""Positions of a chunk whose terms cancel, merged again for either sign: what is written over them.

One position at a time, in the order of the chunk's own operations, so with its bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mergesearch.merging.kernels.chunks.columns import CHUNK
from mergesearch.merging.kernels.chunks.terms import LARGEST, SUM, TERMS_AT
from mergesearch.merging.kernels.numba_kernel import compiled
from mergesearch.merging.kernels.source_numba import bits_of, float_of

_AT = types.int64
_ROOM = types.Array(types.float32, 1, "C")
_SUMS = types.Array(types.float64, 1, "C")
_WEIGHTS = types.Array(types.float32, 1, "C")

#: Positions and what is stored there, as 32 bits.
PATCHES = types.Tuple([types.Array(types.int64, 1, "C"), types.Array(types.uint32, 1, "C")])


@intrinsic  # type: ignore[untyped-decorator]
def lowest_one(_typing: Any, _bits: Any) -> Any:
    """The number of the lowest bit that is set, of bits that are not all 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.true_bit)

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def ones(_typing: Any, _bits: Any) -> Any:
    """How many bits are set."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), generate


@compiled(types.float32(_ROOM, _AT, _AT, _AT, types.float32, _WEIGHTS))
def _merged_at(room: Any, count: int, lane: int, rule: int, sign: Any, weights: Any) -> Any:
    """One position merged with a sign: what the chunk's code does, in the same order."""
    zero = np.float32(0)
    largest = zero
    number = zero
    for k in range(count):
        value = room[TERMS_AT + k * CHUNK + lane]
        if rule == LARGEST and value * sign > zero and abs(value) > largest:
            largest = abs(value)
    for k in range(count):
        value = room[TERMS_AT + k * CHUNK + lane]
        if value * sign > zero and abs(value) >= largest and rule != SUM:
            number = number + np.float32(1)
    merged = room[lane]
    for k in range(count):
        if weights[k] != 0:
            value = room[TERMS_AT + k * CHUNK + lane]
            kept = value if value * sign > zero and abs(value) >= largest else zero
            divisor = number if number > 1 else np.float32(1)
            merged = merged + weights[k] * (kept / divisor)
    return merged


@compiled(types.uint32(types.float32, _AT))
def _stored_bits(number: Any, kind: int) -> Any:
    """The bits that a number is stored as."""
    bits = bits_of(number)
    if kind == 0:
        return bits
    if number != number:
        return np.uint32(0x7FC0)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint32((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@compiled(types.void(_ROOM, _AT, types.float32, types.float32, _AT, _SUMS))
def _add_squares(room: Any, lane: int, merged: float, by: float, kind: int, sums: Any) -> None:
    """Add the squares of a position's rounding and change, times ``by``."""
    if kind != 0:
        stored = float_of(np.uint32(_stored_bits(merged, kind) << np.uint32(16)))
        sums[2] += by * np.float64(stored - merged) ** 2
        sums[3] += by * np.float64(merged - room[lane]) ** 2


@compiled(
    _AT(_ROOM, _AT, _AT, _AT, types.UniTuple(_AT, 3), types.float32, _WEIGHTS, PATCHES, _SUMS)
)
def note_patches(
    room: Any,
    count: int,
    cancelled: int,
    start: int,
    how: Any,
    sign: Any,
    weights: Any,
    patches: Any,
    sums: Any,
) -> Any:
    """Note what cancelled positions of a chunk, merged with ``sign``, would be for the other one.

    Args:
        room: What the chunk's code left.
        count: Number of experts.
        cancelled: Bits of the positions.
        start: Of the chunk.
        how: The rule, the kind of the result's numbers, and how many patches there are already.
        sign: Of the merge.
        weights: Of the experts.
        patches: Room for more.
        sums: Become what the patches change in the squares of rounding and change.

    Returns:
        How many patches there are, −1 where there is no room for more.
    """
    rule, kind, used = how
    positions, numbers = patches
    while cancelled != 0:
        lane = lowest_one(cancelled)
        cancelled &= cancelled - 1
        written = _merged_at(room, count, lane, rule, sign, weights)
        other = _merged_at(room, count, lane, rule, -sign, weights)
        _add_squares(room, lane, written, np.float32(-1), kind, sums)
        _add_squares(room, lane, other, np.float32(1), kind, sums)
        bits = _stored_bits(other, kind)
        if bits == _stored_bits(written, kind):
            continue
        if used == positions.size:
            return -1
        positions[used] = start + lane
        numbers[used] = bits
        used += 1
    return used
