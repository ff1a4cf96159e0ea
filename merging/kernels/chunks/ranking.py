"""Rows ranked by magnitude, and what becomes of their elements by rank.

Elements of a row are ranked by sorting 64-bit numbers, magnitude above position. No two are equal,
so every sort gives the order of a stable one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from mergesearch.merging.kernels.chunks.draws import draw_bits
from mergesearch.merging.kernels.numba_kernel import compiled

#: Elements ranked at a time, in whole rows: their numbers stay in the second-level cache.
BLOCK = 1 << 16

#: Elements to a counter of random bits.
_PER_STEP = 8

_ROWS = types.Array(types.float32, 2, "C")
_BITS = types.Array(types.uint32, 2, "C")
_KEYS = types.Array(types.uint64, 2, "C")
_CHANCES = types.Array(types.int64, 1, "C")
_FACTORS = types.Array(types.float32, 1, "C")


@compiled(types.void(_BITS, types.uint32, _KEYS), nogil=True)
def _make_keys(bits: Any, flip: int, keys: Any) -> None:
    """Magnitudes, their bits flipped where ``flip`` has them, above positions in the row."""
    for row in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            magnitude = (bits[row, i] & np.uint32(0x7FFFFFFF)) ^ flip
            keys[row, i] = (np.uint64(magnitude) << np.uint64(32)) | np.uint64(i)


@compiled(types.void(_ROWS, _KEYS, _BITS, _CHANCES, _FACTORS), nogil=True)
def _drop(rows: Any, keys: Any, bits: Any, chances: Any, factors: Any) -> None:
    for row in range(rows.shape[0]):
        for rank in range(rows.shape[1]):
            i = np.int64(keys[row, rank] & np.uint64(0xFFFFFFFF))
            survives = np.int64(bits[row, i]) < chances[rank]
            rows[row, i] = rows[row, i] * factors[rank] if survives else np.float32(0)


@compiled(types.void(_ROWS, _KEYS, types.int64, types.int64), nogil=True)
def _keep(rows: Any, keys: Any, first: int, last: int) -> None:
    for row in range(rows.shape[0]):
        for rank in range(rows.shape[1]):
            if rank < first or rank >= last:
                rows[row, np.int64(keys[row, rank] & np.uint64(0xFFFFFFFF))] = np.float32(0)


def drop_by_rank(
    values: npt.NDArray[np.float32],
    length: int,
    key: int,
    chances: npt.NDArray[np.int64],
    factors: npt.NDArray[np.float32],
) -> None:
    """Drop elements by a chance that goes by their rank, and multiply the others, in place.

    Ranks are those of magnitudes in their row, ascending, equal ones by position.

    Args:
        values: Contiguous rows one after another, ``(n,)``, finite.
        length: Of a row.
        key: Of the random bits of all elements, 128 bits.
        chances: ``(length,)``: the element of a rank survives where its bits are below.
        factors: ``(length,)``, of survivors.
    """
    for start in _starts(values.size, length):
        rows = _rows(values, start, length)
        before = start % _PER_STEP
        bits = draw_bits(key, start // _PER_STEP, before + rows.size)[before:]
        _drop(rows, _ranked(rows, 0), bits.reshape(rows.shape), chances, factors)


def keep_ranks(values: npt.NDArray[np.float32], length: int, first: int, last: int) -> None:
    """Set everything but the ranks ``first`` to ``last`` (excluded, from 0) of each row to 0.

    Ranks are those of magnitudes in their row, descending, equal ones by position; ``values`` is as
    for :func:`drop_by_rank`.
    """
    for start in _starts(values.size, length):
        rows = _rows(values, start, length)
        _keep(rows, _ranked(rows, 0x7FFFFFFF), first, last)


def _starts(size: int, length: int) -> range:
    """Where blocks of whole rows begin."""
    return range(0, size, max(1, BLOCK // length) * length)


def _rows(values: npt.NDArray[np.float32], start: int, length: int) -> npt.NDArray[np.float32]:
    """The rows of a block, as a view."""
    return values[start : start + max(1, BLOCK // length) * length].reshape(-1, length)


def _ranked(rows: npt.NDArray[np.float32], flip: int) -> npt.NDArray[np.uint64]:
    """Keys of a block, each row in ascending order."""
    keys = np.empty(rows.shape, np.uint64)
    _make_keys(rows.view(np.uint32), np.uint32(flip), keys)
    keys.sort(axis=1)
    return keys
