"""TIES in one pass over weights as they are stored, fp32 or bf16.

Difference, trimming, election and sum are the same operations in the same order as on prepared
rows, so the same bits, without making the rows: blocks of all experts lie in the cache at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from mergesearch.merging.kernels.numba_kernel import _set1, compiled
from mergesearch.merging.kernels.source_numba import _addresses_of, _load, _store
from mergesearch.merging.kernels.sparse_numba import (
    BLOCK,
    RULES,
    _keep_agreeing,
    _keep_largest,
    _raise_to,
    _signs,
)

_ROW = types.Array(types.float32, 1, "C")
_ROWS = types.Array(types.float32, 2, "C")
_TOTAL = types.Array(types.float64, 1, "C")
_INDEX = types.int64[::1]


@compiled(types.void(_ROW, _ROW, types.float32, _ROW, types.Array(types.float64, 1, "C")))
def _take(row: Any, base: Any, limit: float, size: Any, total: Any) -> None:
    """Make a row its trimmed difference from the base.

    Adds it to the totals, and its magnitude to the sizes.
    """
    for i in range(row.size):
        change = row[i] - base[i]
        kept = change if abs(change) >= limit else np.float32(0)
        row[i] = kept
        # NaN where the change is not finite, kept or not
        size[i] = size[i] + (abs(kept) + np.float32(0) * change)
        total[i] = total[i] + np.float64(kept)


@compiled(
    types.boolean(_INDEX, _INDEX, types.float32[::1], types.int64, types.int64, _ROWS, _TOTAL)
)
def _trimmed(
    addresses: Any, kinds: Any, limits: Any, start: int, n: int, rows: Any, total: Any
) -> bool:
    """Fill a block: the base, trimmed differences, and the sum of their magnitudes.

    ``rows[0]`` is the base, ``rows[k]`` the difference of expert k, the last row the sum.

    Returns whether all of it is finite.
    """
    base = rows[0, :n]
    size = rows[rows.shape[0] - 1, :n]
    _load(base, addresses[0], kinds[0], start)
    total[:n] = 0
    size[:] = 0
    for k in range(1, addresses.size):
        row = rows[k, :n]
        _load(row, addresses[k], kinds[k], start)
        _take(row, base, limits[k - 1], size, total[:n])
    odd = 0
    for i in range(n):
        # Counted: whole numbers add up in vectors, fp32 ones do not.
        odd += 1 if size[i] - size[i] != 0 else 0
    return odd == 0


@compiled(types.int64(_INDEX, _INDEX, types.float32[::1], types.int64), nogil=True)
def _balance(addresses: Any, kinds: Any, limits: Any, size: int) -> int:
    rows = np.empty((addresses.size + 1, BLOCK), np.float32)
    total = np.empty(BLOCK, np.float64)
    above = below = 0
    for start in range(0, size, BLOCK):
        n = min(BLOCK, size - start)
        _trimmed(addresses, kinds, limits, start, n, rows, total)
        for i in range(n):
            above += 1 if total[i] > 0 else 0
            below += 1 if total[i] < 0 else 0
    return above - below


@compiled(types.void(_ROWS, types.int64, types.int64, _ROW, _ROW, _ROW))
def _reduce_to_largest(rows: Any, terms: int, n: int, sign: Any, size: Any, count: Any) -> None:
    """Keep the largest magnitudes of the elected sign in the rows.

    ``count`` is how many rows share them.
    """
    size[:] = 0
    for k in range(1, terms):
        _keep_agreeing(rows[k, :n], sign, count)
        _raise_to(rows[k, :n], size)
    count[:] = 0
    for k in range(1, terms):
        _keep_largest(rows[k, :n], size, count)


@compiled(types.void(_ROW, _ROW, _ROW))
def _count_agreeing(row: Any, sign: Any, count: Any) -> None:
    for i in range(row.size):
        count[i] = count[i] + (np.float32(1) if row[i] * sign[i] > 0 else np.float32(0))


@compiled(types.void(_ROW, _ROW, _ROW, _ROW, types.float32))
def _add_elected(merged: Any, row: Any, sign: Any, count: Any, weight: float) -> None:
    for i in range(row.size):
        kept = row[i] if row[i] * sign[i] > 0 else np.float32(0)
        merged[i] = merged[i] + weight * (kept / (count[i] if count[i] > 1 else np.float32(1)))


@compiled(
    types.int64(
        _INDEX,
        _INDEX,
        types.float32[::1],
        types.Array(types.float32, 2, "C", readonly=True),
        types.Array(types.int64, 1, "C", readonly=True),
        types.int64,
        types.float32,
        types.int64,
        types.int64,
        types.float64[::1],
    ),
    nogil=True,
)
def _merge(
    addresses: Any,
    kinds: Any,
    limits: Any,
    weights: Any,
    boundaries: Any,
    rule: int,
    majority: float,
    out: int,
    out_kind: int,
    sums: Any,
) -> int:
    """:func:`merge_elected` into the array at ``out``; -1 where something is not finite."""
    terms = addresses.size
    rows = np.empty((terms + 1, BLOCK), np.float32)
    total = np.empty(BLOCK, np.float64)
    scratch = np.empty((3, BLOCK), np.float32)
    cancelled = 0
    for segment in range(boundaries.size - 1):
        for start in range(boundaries[segment], boundaries[segment + 1], BLOCK):
            n = min(BLOCK, boundaries[segment + 1] - start)
            if not _trimmed(addresses, kinds, limits, start, n, rows, total):
                return -1
            size = rows[terms, :n]
            sign = scratch[0, :n]
            count = scratch[1, :n]
            merged = scratch[2, :n]
            cancelled += _signs(total[:n], size, sign, majority)
            count[:] = 0
            if rule == 2:
                _reduce_to_largest(rows, terms, n, sign, size, count)
            elif rule == 0:
                for k in range(1, terms):
                    _count_agreeing(rows[k, :n], sign, count)
            _set1(merged, rows[0, :n], np.float32(1))
            for k in range(1, terms):
                if weights[k, segment] != 0:
                    _add_elected(merged, rows[k, :n], sign, count, weights[k, segment])
            _store(out, out_kind, start, merged, rows[0, :n], sign, sums)
    return cancelled


def balance_stored(sources: Sequence[Any], limits: Sequence[float]) -> int:
    """Positions whose trimmed differences sum to more than 0, minus those below 0.

    The sources must be finite.
    """
    return int(
        _balance(*_addresses_of(sources), np.array(limits, dtype=np.float32), sources[0].size)
    )


def merge_elected(
    sources: Sequence[Any],
    limits: Sequence[float],
    weights: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.int64],
    rule: str,
    majority: int,
    out: Any,
) -> tuple[int, float, float]:
    """Write base + Σ c_k elected_k into ``out``, in the frozen mode of TIES.

    Args:
        sources: Base and experts, each contiguous ``(n,)``: fp32, or bf16 as its bits in uint16.
        limits: For every expert, the magnitude from which on differences are kept.
        weights: ``(1 + experts, segments)``, 1 for the base.
        boundaries: ``(segments + 1,)``.
        rule: ``mean``, ``sum`` or ``max``.
        majority: The sign taken where terms cancel exactly.
        out: ``(n,)``, fp32 or bf16.

    Returns:
        Positions where terms cancel exactly (-1 if something is not finite: nothing that was
        written holds then), Σ (stored − merged)² and Σ (merged − base)².
    """
    sums = np.zeros(2)
    (target,), (kind,) = _addresses_of([out])
    bounds = np.array(limits, dtype=np.float32)
    addresses, kinds = _addresses_of(sources)
    cancelled = _merge(
        addresses,
        kinds,
        bounds,
        weights,
        boundaries,
        RULES.index(rule),
        np.float32(majority),
        int(target),
        int(kind),
        sums,
    )
    return int(cancelled), float(sums[0]), float(sums[1])
