"""Inner products of a vector with base and rows as they are stored, by Triton.

Everything is summed in fp64, in which the product of two fp32 numbers is exact. A program sums a
block of a piece, a second launch adds the blocks of each segment, both in an order of their own
that nothing changes: the same call gives the same bits. There are no atomic additions. The order is
not that of the kernels on a CPU.
"""

# ruff: noqa: RUF005 (Triton's compiler joins tuples, it does not unpack them)
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from mergesearch.merging.kernels.spans import Span
from mergesearch.merging.kernels.triton_blocks import (
    OFFSETS,
    PIECE_FIELDS,
    Tables,
    Uploaded,
    block_rows,
    span_tables,
)
from mergesearch.merging.kernels.triton_decode import (
    OPTIONS,
    STORED,
    check_arrays,
    decoded,
    widened,
)

#: Blocks of a merge that one program works through.
STEPS = 4

#: Sums of blocks that are added at a time.
WIDTH = 1024

_PIECE_FIELDS = tl.constexpr(PIECE_FIELDS)
_OFFSETS = tl.constexpr(OFFSETS)


def products(
    memory: torch.Tensor,
    spans: Sequence[Span],
    vector: torch.Tensor,
    boundaries: npt.NDArray[np.int64],
    *,
    base: bool = False,
    from_base: bool = False,
    tables: Tables | None = None,
) -> npt.NDArray[np.float64]:
    """Inner products of ``vector`` with the decoded rows, over segments.

    Args:
        memory: The arena, uint8 on the device.
        spans: In the order of the flat index; all have K rows.
        vector: ``(n,)``, fp32, bf16 or fp16 on the device.
        boundaries: ``(segments + 1,)``.
        base: Put the products with the base first.
        from_base: Rows are taken minus the base, which is subtracted in fp64.
        tables: What is kept between calls with the same spans.

    Returns:
        fp64 ``(K, segments)``, or ``(1 + K, segments)`` with the base.

    Raises:
        InputError: If spans hold fp64, or the arrays do not fit each other.
    """
    check_arrays(memory, vector, int(boundaries[-1]))
    terms = 1 + len(spans[0].rows) if spans else 1
    segments = len(boundaries) - 1
    rows = block_rows(terms)
    with torch.cuda.device_of(memory):  # type: ignore[no-untyped-call]
        uploaded = span_tables(tables, spans, boundaries, rows * 8 * STEPS, memory.device)
        blocks = sum(own.launch.blocks for own in uploaded)
        sums = torch.empty((blocks, terms), dtype=torch.float64, device=memory.device)
        for own in uploaded:
            _launch(own, memory, vector, sums, base, from_base, rows)
        edges = torch.from_numpy(_edges(uploaded, segments)).to(memory.device)
        out = torch.empty((terms, segments), dtype=torch.float64, device=memory.device)
        _added[(segments, terms)](sums, edges, out, segments, TERMS=terms, WIDTH=WIDTH, **OPTIONS)
        result: npt.NDArray[np.float64] = out.cpu().numpy()
    return result if base else result[1:]


def _launch(
    tables: Uploaded,
    memory: torch.Tensor,
    vector: torch.Tensor,
    sums: torch.Tensor,
    base: bool,
    from_base: bool,
    rows: int,
) -> None:
    signature = tables.launch.signature
    _products[(tables.launch.blocks,)](
        memory,
        vector.view(torch.uint8),
        sums,
        tables.piece_of,
        tables.pieces,
        tables.columns,
        tables.scales,
        tables.flags,
        CODES=signature.codes,
        SHARED=signature.shared,
        ALIGNED=signature.aligned,
        KIND=STORED[vector.dtype],
        BASE=base,
        FROM_BASE=from_base,
        TERMS=sums.shape[1],
        ROWS=rows,
        STEPS=STEPS,
        **OPTIONS,
    )


def _edges(uploaded: Sequence[Uploaded], segments: int) -> npt.NDArray[np.int64]:
    """First block of every segment among all blocks, then their number, ``(segments + 1,)``."""
    counts = np.zeros(segments + 1, np.int64)
    for own in uploaded:
        np.add.at(counts, own.launch.pieces[:, 6] + 1, own.launch.counts)
    return np.cumsum(counts)


@triton.jit  # type: ignore[untyped-decorator]
def _products(
    memory: tl.tensor,
    vector: tl.tensor,
    sums: tl.tensor,
    piece_of: tl.tensor,
    pieces: tl.tensor,
    columns: tl.tensor,
    scales: tl.tensor,
    flags: tl.tensor,
    CODES: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    FROM_BASE: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """The sums of one block of one piece; the tables are those of :class:`Launch`."""
    number = tl.program_id(0)
    piece = pieces + tl.load(piece_of + number).to(tl.int64) * _PIECE_FIELDS
    number = number - tl.load(piece)
    first = tl.load(piece + 2)
    stop = tl.load(piece + 3)
    position = tl.multiple_of(tl.load(piece + 4), 64)
    span = tl.load(piece + 5)
    offsets = columns + span * (TERMS * _OFFSETS)
    tables = (offsets, scales + span * TERMS, flags + span * (TERMS + 1))
    total: tl.tuple = ()
    for _ in tl.static_range(TERMS):
        total = total + (tl.zeros((ROWS,), tl.float64),)
    for step in tl.range(STEPS):
        start = tl.multiple_of(tl.load(piece + 1) + (number * STEPS + step) * (ROWS * 8), 128)
        rows = start + tl.arange(0, ROWS)[:, None] * 8
        lanes = tl.arange(0, 8)[None, :]
        at = rows + lanes
        if (start >= first) & (start + ROWS * 8 <= stop):
            inside = tl.full((ROWS, 8), 1, tl.int32) != 0
            in_row = tl.full((ROWS, 1), 1, tl.int32) != 0
            place = (at, rows, lanes, inside, in_row)
            v = widened(vector, position + at, inside, KIND)
            total = _plus(
                memory, v, tables, place, total, CODES, SHARED, ALIGNED, BASE, FROM_BASE, TERMS
            )
        else:
            inside = (at >= first) & (at < stop)
            in_row = (rows + 8 > first) & (rows < stop)
            place = (at, rows, lanes, inside, in_row)
            v = widened(vector, position + at, inside, KIND)
            total = _plus(
                memory, v, tables, place, total, CODES, SHARED, ALIGNED, BASE, FROM_BASE, TERMS
            )
    slot = tl.load(piece + 7) + number
    for t in tl.static_range(TERMS):
        tl.store(sums + slot * TERMS + t, tl.sum(total[t], axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _plus(
    memory: tl.tensor,
    vector: tl.tensor,
    tables: tl.tensor,
    place: tl.tensor,
    total: tl.tensor,
    CODES: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BASE: tl.constexpr,
    FROM_BASE: tl.constexpr,
    TERMS: tl.constexpr,
) -> tl.tensor:
    """The sums so far, fp64 ``(ROWS,)`` for every term, plus those of a block."""
    always = tl.full((), 1, tl.int32) != 0
    used: tl.tuple = (always & (BASE or FROM_BASE),)
    for _ in tl.static_range(1, TERMS):
        used = used + (always,)
    rows = decoded(memory, tables, place, used, CODES, SHARED, ALIGNED, TERMS)
    wide = vector.to(tl.float64)
    result: tl.tuple = ()
    for t in tl.static_range(TERMS):
        term = rows[t].to(tl.float64)
        if FROM_BASE and t > 0:
            term = term - rows[0].to(tl.float64)
        # Elements that are not loaded are 0, and so is the vector there.
        result = result + (total[t] + tl.sum(wide * term, axis=1),)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _added(
    sums: tl.tensor,
    edges: tl.tensor,
    out: tl.tensor,
    segments: tl.tensor,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """The sums of the blocks of one segment and one term, added up."""
    segment = tl.program_id(0)
    term = tl.program_id(1)
    stop = tl.load(edges + segment + 1)
    total = tl.zeros((WIDTH,), tl.float64)
    for start in tl.range(tl.load(edges + segment), stop, WIDTH):
        at = start + tl.arange(0, WIDTH)
        total += tl.load(sums + at * TERMS + term, mask=at < stop, other=0.0)
    tl.store(out + term * segments + segment, tl.sum(total, axis=0))
