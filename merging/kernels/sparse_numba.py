"""Counting, trimming and electing compiled by numba, for contiguous fp32 in main memory.

The same results, to the bit, as the torch code that they stand in for, in one pass without
temporaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from mergesearch.merging.kernels.numba_kernel import _pointer, compiled

Floats = npt.NDArray[np.float32]
RULES = ("mean", "sum", "max")

_ROW = types.Array(types.float32, 1, "C")
_KEYS = types.Array(types.uint32, 1, "C", readonly=True)
_COUNTS = types.Array(types.int64, 1, "C")


@compiled(types.void(_KEYS, _COUNTS), nogil=True)
def count_upper(bits: Any, counts: Any) -> None:
    """Count magnitudes, given as the bits of fp32, by their upper 16 bits.

    ``counts`` is ``(4, 65536)``, flat.

    Four histograms in turn: neighbours often share a bin, and would wait for each other's addition.
    """
    whole = bits.size - bits.size % 4
    for i in range(0, whole, 4):
        counts[(bits[i] >> 16) & 0x7FFF] += 1
        counts[65536 + ((bits[i + 1] >> 16) & 0x7FFF)] += 1
        counts[131072 + ((bits[i + 2] >> 16) & 0x7FFF)] += 1
        counts[196608 + ((bits[i + 3] >> 16) & 0x7FFF)] += 1
    for i in range(whole, bits.size):
        counts[(bits[i] >> 16) & 0x7FFF] += 1


@compiled(types.void(_KEYS, types.uint32, _COUNTS), nogil=True)
def count_lower(bits: Any, upper: int, counts: Any) -> None:
    """Count magnitudes whose upper 16 bits are ``upper`` by their lower 16 bits.

    ``counts`` is ``(65536,)``.
    """
    for i in range(bits.size):
        if (bits[i] >> 16) & 0x7FFF == upper:
            counts[bits[i] & 0xFFFF] += 1


@compiled(types.void(_ROW, types.float32), nogil=True)
def drop_below(values: Floats, threshold: float) -> None:
    """Set magnitudes below ``threshold`` to 0, in place."""
    for i in range(values.size):
        value = values[i]
        values[i] = value if abs(value) >= threshold else np.float32(0)


#: Positions elected at a time: a few rows of them stay in the first-level cache.
BLOCK = 1024


@compiled(types.void(_ROW, _ROW, types.Array(types.float64, 1, "C")))
def _add_term(row: Floats, size: Floats, total: Any) -> None:
    for i in range(row.size):
        total[i] = total[i] + np.float64(row[i])
        size[i] = size[i] + abs(row[i])


@compiled(types.int64(types.Array(types.float64, 1, "C"), _ROW, _ROW, types.float32))
def _signs(total: Any, size: Floats, sign: Floats, majority: float) -> int:
    """Signs of the totals, the majority's where terms cancel; returns how many do."""
    cancelled = 0
    for i in range(total.size):
        cancels = (total[i] == 0) & (size[i] > 0)
        unit = np.float32(1) if total[i] > 0 else np.float32(0)
        unit = np.float32(-1) if total[i] < 0 else unit
        sign[i] = majority if cancels else unit
        cancelled += cancels
    return cancelled


@compiled(types.void(_ROW, _ROW, _ROW))
def _keep_agreeing(row: Floats, sign: Floats, count: Floats) -> None:
    for i in range(row.size):
        agrees = row[i] * sign[i] > 0
        row[i] = row[i] if agrees else np.float32(0)
        count[i] = count[i] + (np.float32(1) if agrees else np.float32(0))


@compiled(types.void(_ROW, _ROW))
def _raise_to(row: Floats, largest: Floats) -> None:
    for i in range(row.size):
        size = abs(row[i])
        largest[i] = size if size > largest[i] else largest[i]


@compiled(types.void(_ROW, _ROW, _ROW))
def _keep_largest(row: Floats, largest: Floats, count: Floats) -> None:
    for i in range(row.size):
        holds = (abs(row[i]) == largest[i]) & (row[i] != 0)
        row[i] = row[i] if holds else np.float32(0)
        count[i] = count[i] + (np.float32(1) if holds else np.float32(0))


@compiled(types.void(_ROW, _ROW))
def _divide(row: Floats, count: Floats) -> None:
    for i in range(row.size):
        row[i] = row[i] / (count[i] if count[i] > 1 else np.float32(1))


@compiled(_ROW(types.int64, types.int64, types.int64))
def _row(address: int, start: int, stop: int) -> Any:
    return numba.carray(_pointer(address + 4 * start), stop - start)


@compiled(types.int64(types.int64[::1], types.int64, types.int64, types.float32), nogil=True)
def _elect(addresses: Any, n: int, rule: int, majority: float) -> int:
    """:func:`elect_rows` on the rows at ``addresses``."""
    directions = addresses.size
    totals = np.empty(BLOCK, np.float64)
    scratch = np.empty((3, BLOCK), np.float32)
    cancelled = 0
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        total = totals[: stop - start]
        size = scratch[0, : stop - start]
        sign = scratch[1, : stop - start]
        count = scratch[2, : stop - start]
        total[:] = 0
        size[:] = 0
        count[:] = 0
        for k in range(directions):
            _add_term(_row(addresses[k], start, stop), size, total)
        cancelled += _signs(total, size, sign, majority)
        for k in range(directions):
            _keep_agreeing(_row(addresses[k], start, stop), sign, count)
        if rule == 2:
            size[:] = 0
            count[:] = 0
            for k in range(directions):
                _raise_to(_row(addresses[k], start, stop), size)
            for k in range(directions):
                _keep_largest(_row(addresses[k], start, stop), size, count)
        if rule != 1:
            for k in range(directions):
                _divide(_row(addresses[k], start, stop), count)
    return cancelled


@compiled(types.boolean(types.int64[::1], types.int64), nogil=True)
def _cancels(addresses: Any, n: int) -> bool:
    """:func:`cancels` of the rows at ``addresses``."""
    totals = np.empty(BLOCK, np.float64)
    scratch = np.empty((2, BLOCK), np.float32)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        total = totals[: stop - start]
        size = scratch[0, : stop - start]
        sign = scratch[1, : stop - start]
        total[:] = 0
        size[:] = 0
        for k in range(addresses.size):
            _add_term(_row(addresses[k], start, stop), size, total)
        if _signs(total, size, sign, np.float32(0)) > 0:
            return True
    return False


@compiled(types.int64(types.int64[::1], types.int64), nogil=True)
def _balance(addresses: Any, n: int) -> int:
    """:func:`balance` of the rows at ``addresses``."""
    totals = np.empty(BLOCK, np.float64)
    scratch = np.empty(BLOCK, np.float32)
    above = below = 0
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        total = totals[: stop - start]
        total[:] = 0
        for k in range(addresses.size):
            _add_term(_row(addresses[k], start, stop), scratch[: stop - start], total)
        for i in range(stop - start):
            above += 1 if total[i] > 0 else 0
            below += 1 if total[i] < 0 else 0
    return above - below


def elect_rows(rows: Sequence[Floats], rule: str, majority: int) -> int:
    """Elect a sign at every position and keep of each row what has it, in place.

    Args:
        rows: K contiguous arrays ``(n,)``, finite.
        rule: ``mean`` divides what is kept by its number, ``sum`` leaves it, ``max`` keeps the
            largest, shared by equal ones.
        majority: The sign taken where terms cancel exactly: 1, -1, or 0 for none.

    Returns:
        The number of positions where terms cancel exactly.
    """
    addresses = np.array([row.ctypes.data for row in rows], dtype=np.int64)
    return int(_elect(addresses, rows[0].size, RULES.index(rule), np.float32(majority)))


def cancels(rows: Sequence[Floats]) -> bool:
    """Whether there is a position whose terms, not all 0, sum to exactly 0."""
    addresses = np.array([row.ctypes.data for row in rows], dtype=np.int64)
    return bool(_cancels(addresses, rows[0].size))


def balance(rows: Sequence[Floats]) -> int:
    """Positions whose terms sum to more than 0, minus those whose terms sum to less."""
    addresses = np.array([row.ctypes.data for row in rows], dtype=np.int64)
    return int(_balance(addresses, rows[0].size))
