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
from mergesearch.merging.kernels.source_numba import _load, bits_of

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


#: Bins of the upper 16 bits of magnitudes, whose uppermost bit is 0, and how many histograms stand
#: side by side: neighbours often share a bin, and would wait for each other's addition.
UPPER_BINS = 1 << 15
SIDES = 4

_INDEX = types.Array(types.int64, 1, "C")
_KEYS_HELD = types.Array(types.uint32, 1, "C")
_SIDES_HELD = types.Array(types.uint32, 2, "C")

#: Elements whose magnitudes lie in the first-level cache at once.
_KEYS_AT_ONCE = 1024


@compiled(types.void(_KEYS_HELD, _ROW, _ROW))
def _magnitude_bits(keys: Any, row: Any, base: Any) -> None:
    for i in range(keys.size):
        keys[i] = bits_of(row[i] - base[i]) & np.uint32(0x7FFFFFFF)


@compiled(types.void(_KEYS_HELD, _SIDES_HELD))
def _count_digits(keys: Any, counts: Any) -> None:
    whole = keys.size - keys.size % SIDES
    for i in range(0, whole, SIDES):
        for side in range(SIDES):
            counts[side, keys[i + side] >> 16] += 1
    for i in range(whole, keys.size):
        counts[0, keys[i] >> 16] += 1


@compiled(types.void(_KEYS_HELD, types.uint32, types.uint32, types.Array(types.uint8, 1, "C")))
def _find_between(keys: Any, low: int, high: int, found: Any) -> None:
    for i in range(keys.size):
        found[i] = np.uint8(1) if (keys[i] >= low) & (keys[i] <= high) else np.uint8(0)


@compiled(types.int64(_KEYS_HELD, types.uint32))
def _count_above(keys: Any, high: Any) -> Any:
    above = np.uint32(0)
    for i in range(keys.size):
        above = np.uint32(above + (np.uint32(1) if keys[i] > high else np.uint32(0)))
    return np.int64(above)


@compiled(types.uint32(_KEYS_HELD))
def _largest(keys: Any) -> Any:
    largest = np.uint32(0)
    for i in range(keys.size):
        largest = max(largest, keys[i])
    return largest


@compiled(types.int64(_KEYS_HELD, types.int64, types.Array(types.uint64, 1, "C"), _KEYS_HELD))
def _count_following(keys: Any, first: int, found: Any, counts: Any) -> Any:
    """Count magnitudes from the bin ``first`` of upper bits on, by all their bits.

    ``found`` is room for a byte for each key. Returns how many are above all that is counted.
    """
    low = first << 16
    high = np.uint32(low + counts.size - 1)
    flags = found.view(np.uint8)
    _find_between(keys, np.uint32(low), high, flags[: keys.size])
    flags[keys.size :] = 0
    for word in range(found.size):
        if found[word]:
            for i in range(word * 8, word * 8 + 8):
                if flags[i]:
                    counts[np.int64(keys[i]) - low] += 1
    return _count_above(keys, high)


@compiled(
    types.void(
        _INDEX,
        _INDEX,
        types.int64,
        types.int64,
        types.int64,
        types.Array(types.uint32, 3, "C"),
        _INDEX,
        types.Array(types.uint32, 2, "C"),
        types.Array(types.int64, 2, "C"),
    ),
    nogil=True,
)
def count_changes(
    addresses: Any,
    kinds: Any,
    size: int,
    run: int,
    stride: int,
    upper: Any,
    firsts: Any,
    lower: Any,
    found: Any,
) -> None:
    """Count the magnitudes of changes ``expert − base`` by their bits, without storing them.

    Args:
        addresses: Of base and experts, ``size`` numbers each.
        kinds: 0 for fp32, 1 for bf16.
        size: Of each.
        run: Elements that are counted, of every ``stride``.
        stride: The same as ``run`` to count all.
        upper: ``(experts, SIDES, UPPER_BINS)``, counts by the upper 16 bits; no expert for none.
        firsts: For every expert the first bin of upper bits whose magnitudes are counted apart.
        lower: ``(experts, bins · 65536)``, counts of these by all bits; no bins for none.
        found: ``(experts, 2)``: how many are above these, and the bits of the largest.
    """
    base = np.empty(_KEYS_AT_ONCE, np.float32)
    row = np.empty(_KEYS_AT_ONCE, np.float32)
    keys = np.empty(_KEYS_AT_ONCE, np.uint32)
    flags = np.empty(_KEYS_AT_ONCE // 8, np.uint64)
    for begin in range(0, size, stride):
        end = min(begin + run, size)
        for start in range(begin, end, _KEYS_AT_ONCE):
            n = min(_KEYS_AT_ONCE, end - start)
            _load(base[:n], addresses[0], kinds[0], start)
            for k in range(addresses.size - 1):
                _load(row[:n], addresses[k + 1], kinds[k + 1], start)
                _magnitude_bits(keys[:n], row[:n], base[:n])
                found[k, 1] = max(found[k, 1], np.int64(_largest(keys[:n])))
                if upper.shape[0] > 0:
                    _count_digits(keys[:n], upper[k])
                if lower.shape[1] > 0:
                    found[k, 0] += _count_following(keys[:n], firsts[k], flags, lower[k])


@compiled(
    [types.int64(types.Array(kind, 1, "C"), types.int64) for kind in (types.uint32, types.int64)]
)
def find_from_above(counts: Any, rank: Any) -> int:
    """The bin in which the number of a rank lies, 1 being the largest; −1 if in none."""
    left = rank
    if left < 1:
        return -1
    for i in range(counts.size - 1, -1, -1):
        left -= np.int64(counts[i])
        if left < 1:
            return i
    return -1


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
