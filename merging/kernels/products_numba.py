"""Inner products compiled by numba, for contiguous fp32 in main memory.

Additions are spread over lanes of their own, in a fixed order: the compiler may use vector
instructions of any width without a change of bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from mergesearch.merging.kernels.numba_kernel import Floats, _pointer, compiled

#: Sums that run side by side: those of a few rows stay in the first-level cache.
LANES = 64

#: Elements of the vector that wait in the first-level cache for all rows.
BLOCK = 2048

#: Pieces that one call works through: a slow core delays little.
PIECES_PER_TASK = 16

_Wide = npt.NDArray[np.float64]
_Index = npt.NDArray[np.int64]

_READ = types.Array(types.float32, 1, "C", readonly=True)
_SUMS = types.Array(types.float64, 1, "C")
_INDICES = types.Array(types.int64, 1, "C", readonly=True)


def products(
    vector: Floats,
    others: Sequence[Floats],
    starts: _Index,
    stops: _Index,
    from_first: bool,
    threads: int,
) -> _Wide:
    """Inner products of ``vector`` with each of ``others``, over pieces: fp64 ``(others, pieces)``.

    With ``from_first``, all others but the first are taken minus the first.
    """
    addresses = np.array([other.ctypes.data for other in others], dtype=np.int64)
    sums = np.zeros((len(starts), len(others)))

    def work(group: slice) -> None:
        _products(
            vector.ctypes.data,
            addresses,
            starts[group],
            stops[group],
            from_first,
            sums[group],
        )

    over_pieces(work, len(starts), threads)
    return sums.T


def over_pieces(work: Callable[[slice], None], count: int, threads: int) -> None:
    """Run ``work`` on every group of :data:`PIECES_PER_TASK` of ``count`` pieces, on threads."""
    groups = [slice(i, min(i + PIECES_PER_TASK, count)) for i in range(0, count, PIECES_PER_TASK)]
    if threads <= 1 or len(groups) <= 1:
        for group in groups:
            work(group)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, groups))


@compiled(types.void(_SUMS, _READ, _READ))
def add_block(lanes: _Wide, a: Floats, b: Floats) -> None:
    """``lanes[l] += Σ_j a[j · LANES + l] · b[j · LANES + l]``."""
    n = a.size
    at = 0
    while at + 2 * LANES <= n:
        a0 = a[at : at + LANES]
        a1 = a[at + LANES : at + 2 * LANES]
        b0 = b[at : at + LANES]
        b1 = b[at + LANES : at + 2 * LANES]
        for i in range(LANES):
            partial = lanes[i] + np.float64(a0[i]) * np.float64(b0[i])
            lanes[i] = partial + np.float64(a1[i]) * np.float64(b1[i])
        at += 2 * LANES
    while at < n:
        stop = min(at + LANES, n)
        a0 = a[at:stop]
        b0 = b[at:stop]
        for i in range(stop - at):
            lanes[i] = lanes[i] + np.float64(a0[i]) * np.float64(b0[i])
        at = stop


@compiled(types.void(_SUMS, _READ, _READ, _READ))
def add_difference(lanes: _Wide, a: Floats, b: Floats, c: Floats) -> None:
    """:func:`add_block` with ``b - c`` for ``b``."""
    n = a.size
    at = 0
    while at < n:
        stop = min(at + LANES, n)
        a0 = a[at:stop]
        b0 = b[at:stop]
        c0 = c[at:stop]
        for i in range(stop - at):
            lanes[i] = lanes[i] + np.float64(a0[i]) * (np.float64(b0[i]) - np.float64(c0[i]))
        at = stop


@compiled(types.float64(_SUMS))
def sum_lanes(lanes: _Wide) -> float:
    """The sum of the lanes, in a fixed order; overwrites them."""
    width = LANES // 2
    while width > 0:
        for i in range(width):
            lanes[i] += lanes[i + width]
        width //= 2
    return float(lanes[0])


@compiled(
    types.void(
        types.int64,
        types.int64[::1],
        _INDICES,
        _INDICES,
        types.boolean,
        types.Array(types.float64, 2, "C"),
    ),
    nogil=True,
)
def _products(
    vector: int, addresses: Any, starts: _Index, stops: _Index, from_first: bool, out: _Wide
) -> None:
    """Fill ``out`` ``(pieces, rows)``."""
    rows = addresses.size
    lanes = np.empty((rows, LANES), np.float64)
    for piece in range(starts.size):
        lanes[:] = 0.0
        at = starts[piece]
        while at < stops[piece]:
            n = min(BLOCK, stops[piece] - at)
            block = numba.carray(_pointer(vector + 4 * at), n)
            for row in range(rows):
                other = numba.carray(_pointer(addresses[row] + 4 * at), n)
                if from_first and row > 0:
                    add_difference(
                        lanes[row], block, other, numba.carray(_pointer(addresses[0] + 4 * at), n)
                    )
                else:
                    add_block(lanes[row], block, other)
            at += n
        for row in range(rows):
            out[piece, row] = sum_lanes(lanes[row])
