"""Inner products with rows as they are stored, compiled by numba, for arenas in main memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from mergesearch.merging.kernels.chunks.ranges import decode
from mergesearch.merging.kernels.chunks.stamp import stamped
from mergesearch.merging.kernels.numba_kernel import Floats, _pointer, compiled
from mergesearch.merging.kernels.products_numba import (
    BLOCK,
    LANES,
    add_block,
    add_difference,
    over_pieces,
    sum_lanes,
)
from mergesearch.merging.kernels.spans import Span
from mergesearch.merging.kernels.spans_numba import SpanTable

_Wide = npt.NDArray[np.float64]
_Index = npt.NDArray[np.int64]

#: Floats from one decoded row to the next: rows a power of two apart would share cache lines.
_PITCH = BLOCK + 80


def products(
    memory: npt.NDArray[np.uint8],
    spans: Sequence[Span],
    vector: Floats,
    starts: _Index,
    stops: _Index,
    base: bool,
    from_base: bool,
    threads: int,
) -> _Wide:
    """Inner products of ``vector`` with base, if asked for, and rows: fp64 ``(terms, pieces)``.

    Args:
        memory: The arena, ``(bytes,)``.
        spans: That cover all pieces.
        vector: ``(n,)``.
        starts: Of the pieces, positions of the flat index.
        stops: Of the pieces.
        base: Whether the base's products come first.
        from_base: Whether rows are taken minus the base.
        threads: Number of CPU threads.
    """
    table = SpanTable.of(memory, spans)
    sums = np.zeros((len(starts), len(spans[0].rows) + base))

    def work(group: slice) -> None:
        _products(
            table.columns,
            table.scales,
            table.limits,
            vector.ctypes.data,
            starts[group],
            stops[group],
            base,
            from_base,
            sums[group],
        )

    over_pieces(work, len(starts), threads)
    return sums.T


_INDICES = types.Array(types.int64, 1, "C", readonly=True)


@compiled(
    types.void(
        types.Array(types.int64, 3, "C", readonly=True),
        types.Array(types.float32, 2, "C", readonly=True),
        types.Array(types.int64, 2, "C", readonly=True),
        types.int64,
        _INDICES,
        _INDICES,
        types.boolean,
        types.boolean,
        types.Array(types.float64, 2, "C"),
    ),
    nogil=True,
)
@stamped
def _products(
    columns: Any,
    scales: Any,
    limits: Any,
    vector: int,
    starts: _Index,
    stops: _Index,
    base: bool,
    from_base: bool,
    out: _Wide,
) -> None:
    """Fill ``out`` ``(pieces, terms)``."""
    terms = out.shape[1]
    rows = np.empty((terms, _PITCH), np.float32)
    lanes = np.empty((terms, LANES), np.float64)
    first_row = rows.ctypes.data + (_PITCH * 4 if base else 0)
    for piece in range(starts.size):
        lanes[:] = 0.0
        at = starts[piece]
        while at < stops[piece]:
            n = min(BLOCK, stops[piece] - at)
            origin = rows.ctypes.data if base else 0
            decode(columns, scales, limits, at, at + n, origin, first_row, _PITCH * 4)
            block = numba.carray(_pointer(vector + 4 * at), n)
            for row in range(terms):
                if from_base and row > 0:
                    add_difference(lanes[row], block, rows[row, :n], rows[0, :n])
                else:
                    add_block(lanes[row], block, rows[row, :n])
            at += n
        for row in range(terms):
            out[piece, row] = sum_lanes(lanes[row])
