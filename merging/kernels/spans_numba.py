"""``combine`` for rows as they are stored, compiled by numba, for arenas in main memory.

The same operations in the same order as :mod:`mergesearch.merging.kernels.numba_kernel` on the rows
that the spans stand for, so the same bits, rounded once to the dtype of the result. Sums stay in
registers (:mod:`mergesearch.merging.kernels.chunks`), and nothing else is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.kernels.chunks.columns import (
    FIELDS,
    KINDS,
    MASKED,
    MINUS_BASE,
    PACKED,
    SCALED,
    SHARED,
)
from mergesearch.merging.kernels.chunks.ranges import combine_pieces
from mergesearch.merging.kernels.forms import ELECTIONS
from mergesearch.merging.kernels.numba_kernel import stretches
from mergesearch.merging.kernels.spans import Column, Ranges, Span, piece_table
from mergesearch.merging.kernels.triton_blocks import Tables

#: Threads share the positions in multiples of this, so that only ends of spans are ragged.
BLOCK = 1024

Floats = npt.NDArray[np.float32]
_Index = npt.NDArray[np.int64]

#: What tables of spans alone depend on.
_NO_SEGMENTS = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class SpanTable:
    """Spans as compiled code reads them.

    Attributes:
        columns: ``(spans, K + 1, FIELDS)``, base first; addresses at the start of the span.
        scales: ``(spans, K + 1)``, fp32.
        limits: ``(spans, 3)``: first position, position after the last, whether rows are shared.
    """

    columns: _Index
    scales: Floats
    limits: _Index

    @classmethod
    def of(cls, memory: npt.NDArray[np.uint8], spans: Sequence[Span]) -> SpanTable:
        """The table of an arena; it holds addresses, so the arena must outlive it."""
        start = memory.ctypes.data
        columns = [
            [_fields(column, start, span.shared and row > 0) for row, column in _terms(span)]
            for span in spans
        ]
        rows = 1 + (len(spans[0].rows) if spans else 0)
        scales = [[column.scale for _, column in _terms(span)] for span in spans]
        limits = [(span.start, span.stop, int(span.shared)) for span in spans]
        return cls(
            np.array(columns, dtype=np.int64).reshape(len(spans), rows, FIELDS),
            np.array(scales, dtype=np.float32).reshape(len(spans), rows),
            np.array(limits, dtype=np.int64).reshape(len(spans), 3),
        )


def _terms(span: Span) -> enumerate[Column]:
    return enumerate((span.base, *span.rows))


def _fields(column: Column, start: int, shared: bool) -> tuple[int, ...]:
    operation = KINDS[column.dtype]
    operation += MINUS_BASE * column.minus_base
    operation += SCALED * (column.scale != 1)
    operation += MASKED * (column.mask is not None)
    operation += SHARED * shared
    operation += PACKED * (column.starts is not None)
    parts = (column.mask, column.scales, column.starts)
    addresses = (0 if part is None else start + part for part in parts)
    return operation, start + column.offset, *addresses


def combine(
    memory: npt.NDArray[np.uint8],
    spans: Sequence[Span],
    weights: Floats,
    boundaries: _Index,
    out: Any,
    threads: int,
    election: str = "",
    only: Ranges | None = None,
    tables: Tables | None = None,
) -> None:
    """Write the weighted sum of base and rows into ``out``; positions between spans are left.

    Args:
        memory: The arena, ``(bytes,)``.
        spans: In the order of the flat index; no column is float64.
        weights: ``(K + 1, segments)``, base first; a term whose weight is 0 is left out.
        boundaries: ``(segments + 1,)``.
        out: ``(n,)``, contiguous: a torch tensor in main memory or a numpy array, of fp32, fp16 or
            (torch) bf16.
        threads: Number of CPU threads.
        election: How rows are elected instead of summed, or nothing.
        only: Positions that are written, where these are not all; others are left.
        tables: What is kept between merges of the same spans.
    """
    table = _kept_table(memory, spans, tables)
    parts = piece_table(table.limits[:, :2], boundaries, only)
    address, kind = result_address(out)
    rule = ("", *ELECTIONS).index(election)

    def stretch(limits: tuple[int, int]) -> None:
        combine_pieces(
            table.columns, table.scales, table.limits, parts, weights, address, kind, *limits, rule
        )

    tasks = even_shares(parts[:, 2:], len(out), threads)
    if len(tasks) == 1:
        stretch(tasks[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(stretch, tasks))


def _kept_table(
    memory: npt.NDArray[np.uint8], spans: Sequence[Span], tables: Tables | None
) -> SpanTable:
    """The table of an arena, made only where it is not kept."""
    if tables is None:
        return SpanTable.of(memory, spans)
    place = ("numba", memory.ctypes.data)
    [table] = tables.of(spans, _NO_SEGMENTS, place, lambda: [SpanTable.of(memory, spans)])
    return table


def even_shares(ranges: Ranges, size: int, threads: int) -> list[tuple[int, int]]:
    """Positions ``0..size`` cut into tasks for the threads, with as much of the ranges in each."""
    ends = np.cumsum(ranges[:, 1] - ranges[:, 0])
    if threads <= 1 or not len(ends):
        return [(0, size)]
    cuts = [start for start, _ in stretches(int(ends[-1]), threads, BLOCK)][1:]
    within = np.searchsorted(ends, cuts, side="right")
    at = ranges[within, 1] - (ends[within] - cuts)
    edges = [0, *np.unique(at // BLOCK * BLOCK).tolist(), size]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop]


def result_address(out: Any) -> tuple[int, int]:
    """The address of a contiguous array or tensor in main memory, and the kind of its numbers."""
    name = str(out.dtype).removeprefix("torch.")
    address = out.ctypes.data if isinstance(out, np.ndarray) else out.data_ptr()
    return int(address), KINDS[name]
