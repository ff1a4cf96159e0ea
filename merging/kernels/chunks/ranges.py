"""Ranges of spans merged or decoded by compiled code: whole chunks in place, ends in a copy."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from mergesearch.merging.kernels.chunks.columns import CHUNK, FIELDS, MINUS_BASE, PACKED
from mergesearch.merging.kernels.chunks.rows import UNREAD
from mergesearch.merging.kernels.chunks.stamp import stamped
from mergesearch.merging.kernels.chunks.whole import MANY, PIECE, sum_chunks
from mergesearch.merging.kernels.numba_kernel import compiled


@intrinsic  # type: ignore[untyped-decorator]
def _byte_pointer(_typing: Any, _address: Any) -> Any:
    """The address, an int64, as a pointer to bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.int64), generate


_AT = types.int64
_TERMS = types.Array(types.int64, 2, "C")
_SCALARS = types.Array(types.float32, 2, "C")
_LIST = types.Array(types.int64, 1, "C")
_READ2 = types.Array(types.int64, 2, "C", readonly=True)
_READ3 = types.Array(types.int64, 3, "C", readonly=True)
_FLOATS2 = types.Array(types.float32, 2, "C", readonly=True)
_FLOATS1 = types.Array(types.float32, 1, "C", readonly=True)
_BYTES1 = types.Array(types.uint8, 1, "C")
#: Terms, masks and bytes of a padded chunk, and its result, followed by the terms of an election or
#: by what a sum in parts has come to.
_ROOM = types.Tuple([_TERMS, _LIST, _BYTES1, types.Array(types.float32, 1, "C")])


@compiled(types.void(_AT, _AT, _AT))
def copy_bytes(to: int, source: int, count: int) -> None:
    """Copy ``count`` bytes from one address to another."""
    target = numba.carray(_byte_pointer(to), count)
    origin = numba.carray(_byte_pointer(source), count)
    for i in range(count):
        target[i] = origin[i]


@compiled(types.void(_LIST, _AT, _AT, _AT, _AT, _AT))
def _spread_part(term: Any, chunk: int, low: int, high: int, size: int, to: int) -> None:
    """Put packed numbers of elements ``low:high`` of a chunk where those of all elements are."""
    start = np.zeros(1, np.int32)
    copy_bytes(start.ctypes.data, term[4] + 4 * chunk, 4)
    source = term[1] + start[0] * size
    bits = numba.carray(_byte_pointer(term[2] + chunk * (CHUNK // 8)), CHUNK // 8)
    for i in range(high):
        if bits[i // 8] >> (i % 8) & 1:
            if i >= low:
                copy_bytes(to + i * size, source, size)
            source += size


#: Bytes of a padded chunk: of numbers, and of a mask.
_PAD = CHUNK * 4
_MASK_PAD = CHUNK // 8


@compiled(types.void(_TERMS, _AT, _LIST, _AT, _AT, _AT, _TERMS, _LIST, _BYTES1))
def pad_terms(
    terms: Any,
    count: int,
    masks: Any,
    chunk: int,
    low: int,
    high: int,
    padded: Any,
    padded_masks: Any,
    pad: Any,
) -> None:
    """Copy elements ``low:high`` of a chunk of every term to ``pad``, with zeros around them.

    ``padded`` and ``padded_masks`` become terms and masks that read the copy where they read the
    chunk.
    """
    pad[:] = 0
    at = pad.ctypes.data
    first_byte = low // 8
    last_byte = (high + 7) // 8
    for t in range(count + 1):
        size = 4 if terms[t, 0] & 3 == 0 else (1 if terms[t, 0] & 3 == 3 else 2)
        offset = chunk * CHUNK * size
        packed = terms[t, 0] >= 0 and terms[t, 0] & PACKED != 0
        if packed:
            _spread_part(terms[t], chunk, low, high, size, at)
        elif terms[t, 0] >= 0:
            copy_bytes(at + low * size, terms[t, 1] + offset + low * size, (high - low) * size)
        padded[t] = terms[t]
        padded[t, 0] -= PACKED if packed else 0
        padded[t, 1] = at - offset
        at += _PAD
        if terms[t, 2] != 0 and terms[t, 0] >= 0:
            offset = chunk * _MASK_PAD
            copy_bytes(at + first_byte, terms[t, 2] + offset + first_byte, last_byte - first_byte)
            padded[t, 2] = at - offset
        at += _MASK_PAD
    for k in range(masks.size):
        padded_masks[k] = 0
        if masks[k] != 0:
            offset = chunk * _MASK_PAD
            copy_bytes(at + first_byte, masks[k] + offset + first_byte, last_byte - first_byte)
            padded_masks[k] = at - offset
        at += _MASK_PAD


@compiled(types.int64(_READ2, _FLOATS1, _FLOATS1, types.boolean, _TERMS, _SCALARS))
def use_terms(
    columns: Any, scales: Any, weights: Any, whole: bool, terms: Any, scalars: Any
) -> int:
    """Base and the rows whose weight is not 0, first in ``terms``; returns the number of rows.

    The base is marked unread where nothing needs it.
    """
    terms[0] = columns[0]
    scalars[0, 0] = weights[0]
    scalars[0, 1] = np.float32(1)
    needed = whole or weights[0] != 0
    count = 0
    for t in range(1, weights.size):
        if weights[t] != 0:
            count += 1
            terms[count] = columns[t]
            scalars[count, 0] = weights[t]
            scalars[count, 1] = scales[t]
            needed = needed or columns[t, 0] & MINUS_BASE != 0
    if not needed:
        terms[0, 0] = UNREAD
    return count


@compiled(types.void(_TERMS, _SCALARS, _AT, _LIST, *[_AT] * 5, _ROOM))
@stamped
def sum_range(
    terms: Any,
    scalars: Any,
    count: int,
    masks: Any,
    low: int,
    high: int,
    out: int,
    kind: int,
    rule: int,
    room: Any,
) -> None:
    """Write elements ``low:high`` of a span; ``out`` is where element 0 would be."""
    padded, padded_masks, pad, result = room
    size = 4 if kind == 0 else 2
    few = padded_masks[: masks.size]
    scratch = result.ctypes.data + CHUNK * 4
    while low < high:
        chunk = low // CHUNK
        at = low - chunk * CHUNK
        whole = high // CHUNK
        if at == 0 and whole > chunk:
            sum_chunks(terms, scalars, count, masks, chunk, whole, out, kind, rule, scratch)
            low = whole * CHUNK
            continue
        end = min(CHUNK, high - chunk * CHUNK)
        pad_terms(terms, count, masks, chunk, at, end, padded, few, pad)
        there = result.ctypes.data - chunk * CHUNK * size
        sum_chunks(padded, scalars, count, few, chunk, chunk + 1, there, kind, rule, scratch)
        copy_bytes(out + low * size, result.ctypes.data + at * size, (end - at) * size)
        low = chunk * CHUNK + end


@compiled(_ROOM(_AT))
def make_room(rows: int) -> Any:
    """Scratch memory of :func:`sum_range` for so many terms."""
    chunks = max(rows, PIECE if rows > MANY else 0)
    return (
        np.empty((rows, FIELDS), np.int64),
        np.empty(rows, np.int64),
        np.empty(rows * (_PAD + 2 * _MASK_PAD), np.uint8),
        np.empty((1 + chunks) * CHUNK, np.float32),
    )


@compiled(types.int64(_READ2, types.boolean, _LIST))
def find_masks(columns: Any, shared: bool, masks: Any) -> int:
    """The masks of all rows if they are shared; returns their number."""
    if not shared:
        return 0
    for k in range(masks.size):
        masks[k] = columns[k + 1, 2]
    return masks.size  # type: ignore[no-any-return]


@compiled(
    types.void(_READ3, _FLOATS2, _READ2, _READ2, _FLOATS2, _AT, _AT, _AT, _AT, _AT), nogil=True
)
@stamped
def combine_pieces(
    columns: Any,
    scales: Any,
    limits: Any,
    parts: Any,
    weights: Any,
    out: int,
    kind: int,
    start: int,
    stop: int,
    rule: int,
) -> None:
    """The stretch ``start:stop`` of the result, piece by piece."""
    rows = columns.shape[1]
    terms = np.empty((rows, FIELDS), np.int64)
    scalars = np.empty((rows, 2), np.float32)
    masks = np.empty(rows - 1, np.int64)
    room = make_room(rows)
    here = np.empty(rows, np.float32)
    for part in range(parts.shape[0]):
        span = parts[part, 0]
        origin = limits[span, 0]
        low = max(parts[part, 2], start) - origin
        high = min(parts[part, 3], stop) - origin
        if low < high:
            here[:] = weights[:, parts[part, 1]]
            count = use_terms(columns[span], scales[span], here, rule > 0, terms, scalars)
            shared = find_masks(columns[span], limits[span, 2] != 0, masks)
            to = out + origin * (4 if kind == 0 else 2)
            sum_range(terms, scalars, count, masks[:shared], low, high, to, kind, rule, room)


@compiled(types.void(_READ3, _FLOATS2, _READ2, _AT, _AT, _AT, _AT, _AT), nogil=True)
@stamped
def decode(
    columns: Any, scales: Any, limits: Any, start: int, stop: int, base: int, rows: int, pitch: int
) -> None:
    """Decode positions ``start:stop``, fp32; those that no span has are left.

    Args:
        columns: Of the spans, as are ``scales`` and ``limits``.
        scales: Of rows.
        limits: Of spans.
        start: First position.
        stop: Position after the last.
        base: Address for the base, 0 for none.
        rows: Address for the first row.
        pitch: Bytes from row to row.
    """
    terms = np.empty((2, FIELDS), np.int64)
    scalars = np.ones((2, 2), np.float32)
    masks = np.empty(columns.shape[1] - 1, np.int64)
    room = make_room(columns.shape[1] + 1)
    span = np.searchsorted(limits[:, 1], start, side="right")
    while span < limits.shape[0] and limits[span, 0] < stop:
        origin = limits[span, 0]
        low = max(origin, start) - origin
        high = min(limits[span, 1], stop) - origin
        shift = (origin - start) * 4
        shared = masks[: find_masks(columns[span], limits[span, 2] != 0, masks)]
        terms[0] = columns[span, 0]
        scalars[0, 0] = 1
        if base != 0:
            sum_range(terms, scalars, 0, shared, low, high, base + shift, 0, 0, room)
        scalars[0, 0] = 0
        for row in range(1, columns.shape[1]):
            terms[1] = columns[span, row]
            scalars[1, 1] = scales[span, row]
            to = rows + (row - 1) * pitch + shift
            sum_range(terms, scalars, 1, shared, low, high, to, 0, 0, room)
        span += 1
