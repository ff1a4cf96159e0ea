"""``combine`` by Triton: one pass over spans that lie in the memory of a GPU.

The bits are those of the kernels on a CPU: terms in order, each a multiplication and an addition in
fp32, terms of weight 0 left out and not read, one rounding at the end. Where a result is not a
number its bits in fp32 may be others. Elections do the operations of ``_elect_block`` in
:mod:`mergesearch.merging.kernels.numba_kernel`, which are those of its ``_elect_four``, for any
number of rows.

Loads of all terms are under way at once: a term of weight 0 is masked, not skipped by a branch.
Blocks that lie wholly in their piece, nearly all, load and store whole vectors; others are masked
element by element.
"""

# ruff: noqa: RUF005 (Triton's compiler joins tuples, it does not unpack them)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from mergesearch.merging.errors import InputError
from mergesearch.merging.kernels.forms import ELECTIONS
from mergesearch.merging.kernels.spans import (
    ITEMSIZE,
    PACK_BLOCK,
    SCALE_BLOCK,
    Column,
    Span,
    pieces,
)
from mergesearch.merging.kernels.triton_blocks import (
    MASKED,
    OFFSETS,
    PACKED,
    PIECE_FIELDS,
    SCALED,
    Launch,
    Tables,
    Uploaded,
    block_rows,
    launches,
    span_tables,
)
from mergesearch.merging.kernels.triton_decode import (
    OPTIONS,
    STORED,
    check_arrays,
    decoded,
    is_used,
    narrowed,
)

_RULES = ("", *ELECTIONS)
_PIECE_FIELDS = tl.constexpr(PIECE_FIELDS)
_OFFSETS = tl.constexpr(OFFSETS)
_MAX = tl.constexpr(_RULES.index("elect_max"))
_SUM = tl.constexpr(_RULES.index("elect_sum"))
_WEIGHTED = tl.constexpr(_RULES.index("elect_weighted"))


@dataclass(frozen=True)
class Traffic:
    """What a merge moves.

    Attributes:
        launches: Of kernels.
        read: Bytes that kernels load, their tables included, as often as programs load them.
        written: Bytes that kernels store.
        ideal: Bytes that any merge of these weights has to read and write.
    """

    launches: int
    read: int
    written: int
    ideal: int


def combine(
    memory: torch.Tensor,
    spans: Sequence[Span],
    weights: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.int64],
    out: torch.Tensor,
    election: str = "",
    *,
    tables: Tables | None = None,
) -> None:
    """Write the merge of all spans into their positions of ``out``; other positions are left.

    Args:
        memory: The arena, uint8 on the device.
        spans: What to read; all have K rows.
        weights: fp32 ``(K + 1, segments)``, base first.
        boundaries: ``(segments + 1,)``, the last is n.
        out: ``(n,)``, fp32, bf16 or fp16 on the device.
        election: Rule, or empty for the weighted sum; the weight of the base is then taken as 1.
        tables: What is kept between merges of the same spans.

    Raises:
        InputError: If spans hold fp64, or the arrays do not fit each other.
    """
    check_arrays(memory, out, int(boundaries[-1]))
    if not spans:
        return
    expected = (1 + len(spans[0].rows), len(boundaries) - 1)
    if weights.dtype != np.float32 or weights.shape != expected:
        raise InputError(
            f"triton: expected fp32 weights {expected}, received {weights.dtype} {weights.shape}"
        )
    rows = block_rows(len(weights))
    with torch.cuda.device_of(memory):  # type: ignore[no-untyped-call]
        uploaded = span_tables(tables, spans, boundaries, rows * 8, memory.device)
        device_weights = torch.from_numpy(np.ascontiguousarray(weights)).to(memory.device)
        for launch in uploaded:
            _launch(launch, memory, device_weights, out, _RULES.index(election), rows)


def traffic(
    spans: Sequence[Span],
    weights: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.int64],
    out_dtype: str,
    election: str = "",
) -> Traffic:
    """Launches and bytes of a merge by :func:`combine`.

    Args:
        spans: Of the arena.
        weights: ``(K + 1, segments)``, base first; what has weight 0 is not read.
        boundaries: ``(segments + 1,)``.
        out_dtype: Of the result.
        election: Rule, or empty.
    """
    planned = launches(spans, boundaries, 8 * block_rows(len(weights)))
    read = sum(_table_bytes(launch) for launch in planned)
    ideal = 0
    written = 0
    for piece in pieces(spans, boundaries):
        span = spans[piece.span]
        first = piece.start - span.start
        stop = piece.stop - span.start
        for column, whole in _read_columns(span, weights[:, piece.segment], bool(election)):
            exact, loaded = _column_bytes(column, first, stop, whole, span.stop - span.start)
            ideal += exact
            read += loaded
        written += (piece.stop - piece.start) * ITEMSIZE[out_dtype]
    return Traffic(len(planned), read, written, ideal + written)


def _launch(
    tables: Uploaded,
    memory: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    rule: int,
    rows: int,
) -> None:
    signature = tables.launch.signature
    kind = STORED[out.dtype]
    _merge[(tables.launch.blocks,)](
        memory,
        out if out.dtype == torch.float32 else out.view(torch.int16),
        weights,
        tables.piece_of,
        tables.pieces,
        tables.columns,
        tables.scales,
        tables.flags,
        weights.shape[1],
        CODES=signature.codes,
        SHARED=signature.shared,
        ALIGNED=signature.aligned,
        RULE=rule,
        KIND=kind,
        TERMS=len(weights),
        ROWS=rows,
        **OPTIONS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _merge(
    memory: tl.tensor,
    out: tl.tensor,
    weights: tl.tensor,
    piece_of: tl.tensor,
    pieces: tl.tensor,
    columns: tl.tensor,
    scales: tl.tensor,
    flags: tl.tensor,
    segments: tl.tensor,
    CODES: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
    RULE: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One block of one piece; the tables are those of :class:`Launch`."""
    number = tl.program_id(0)
    piece = pieces + tl.load(piece_of + number).to(tl.int64) * _PIECE_FIELDS
    start = tl.load(piece + 1) + (number - tl.load(piece)) * (ROWS * 8)
    start = tl.multiple_of(start, 128)
    first = tl.load(piece + 2)
    stop = tl.load(piece + 3)
    target = out + tl.multiple_of(tl.load(piece + 4), 64)
    span = tl.load(piece + 5)
    offsets = columns + span * (TERMS * _OFFSETS)
    tables = (offsets, scales + span * TERMS, flags + span * (TERMS + 1))
    weights += tl.load(piece + 6)
    own_weights: tl.tuple = ()
    for t in tl.static_range(TERMS):
        own_weights = own_weights + (tl.load(weights + t * segments),)
    rows = start + tl.arange(0, ROWS)[:, None] * 8
    lanes = tl.arange(0, 8)[None, :]
    at = rows + lanes
    if (start >= first) & (start + ROWS * 8 <= stop):
        inside = tl.full((ROWS, 8), 1, tl.int32) != 0
        in_row = tl.full((ROWS, 1), 1, tl.int32) != 0
        place = (at, rows, lanes, inside, in_row)
        total = _merged(memory, own_weights, tables, place, CODES, SHARED, ALIGNED, RULE, TERMS)
        tl.store(target + at, narrowed(total, KIND))
    else:
        inside = (at >= first) & (at < stop)
        in_row = (rows + 8 > first) & (rows < stop)
        place = (at, rows, lanes, inside, in_row)
        total = _merged(memory, own_weights, tables, place, CODES, SHARED, ALIGNED, RULE, TERMS)
        tl.store(target + at, narrowed(total, KIND), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _merged(
    memory: tl.tensor,
    weights: tl.tensor,
    tables: tl.tensor,
    place: tl.tensor,
    CODES: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
    RULE: tl.constexpr,
    TERMS: tl.constexpr,
) -> tl.tensor:
    """The sum, or what is elected, of a block in fp32, ``(ROWS, 8)``."""
    used: tl.tuple = (is_used(weights[0]) | (RULE != 0),)
    any_row = False
    for t in tl.static_range(1, TERMS):
        used = used + (is_used(weights[t]),)
        any_row = any_row | used[t]
    rows = decoded(memory, tables, place, used, CODES, SHARED, ALIGNED, TERMS)
    # -0 + x is x, whatever its sign. By its bits: Triton takes the constant -0.0 for 0.
    total = tl.full(place[0].shape, 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
    if RULE == 0:
        total = tl.where(used[0], total + rows[0] * weights[0], total)
    for t in tl.static_range(1, TERMS):
        total = tl.where(used[t], total + rows[t] * weights[t], total)
    if RULE == 0:
        return tl.where(any_row | used[0], total, 0.0)
    else:  # noqa: RET505 (a branch that is not taken must not be compiled)
        return tl.where(any_row, _elected(rows, weights, total, RULE, TERMS), rows[0])


@triton.jit  # type: ignore[untyped-decorator]
def _elected(
    rows: tl.tensor, weights: tl.tensor, total: tl.tensor, RULE: tl.constexpr, TERMS: tl.constexpr
) -> tl.tensor:
    """The base plus what the terms of the rows elect, given their sum."""
    sign = tl.where(total > 0, 1.0, tl.where(total < 0, -1.0, 0.0))
    sign = sign + total * 0.0  # NaN where the sum is not finite
    kept = tl.zeros(total.shape, tl.float32)
    count = tl.zeros(total.shape, tl.float32)
    for t in tl.static_range(1, TERMS):
        term = (rows[t] * weights[t]) * sign
        used = is_used(weights[t])
        if RULE == _MAX:
            kept = tl.where(used & (term > kept), term, kept)
        else:
            agrees = used & (term > 0)
            kept += tl.where(agrees, term, 0.0)
            if RULE == _WEIGHTED:
                count += tl.where(agrees, tl.abs(weights[t]), 0.0)
            else:
                count += tl.where(agrees, 1.0, 0.0)
    if RULE != _MAX and RULE != _SUM:
        kept = tl.div_rn(kept, tl.where(count > 0, count, 1.0))
    return rows[0] + sign * kept


def _read_columns(
    span: Span, weights: npt.NDArray[np.float32], election: bool
) -> list[tuple[Column, bool]]:
    """Columns of a piece that are read, and whether their numbers are, or their mask alone."""
    used = [bool(weight != 0) for weight in weights[1:]]
    base = election or bool(weights[0] != 0)
    base = base or any(row.minus_base for row, own in zip(span.rows, used, strict=True) if own)
    result = [(span.base, True)] if base else []
    for row, own in zip(span.rows, used, strict=True):
        if own or (span.shared and any(used) and row.mask is not None):
            result.append((row, own))
    return result


def _column_bytes(column: Column, first: int, stop: int, whole: bool, size: int) -> tuple[int, int]:
    """Bytes of elements ``first:stop`` of a column: those that hold them, and those loaded.

    Packed numbers are counted as if they were spread evenly over the ``size`` elements of the span.
    """
    if column.starts is not None:
        return _packed_bytes(column, first, stop, whole, size)
    exact = 0.0
    loaded = 0
    if column.mask is not None:
        exact += (stop - first) / 8
        loaded += -(-stop // 8) - first // 8
    if whole:
        exact += (stop - first) * ITEMSIZE[column.dtype]
        loaded += (stop - first) * ITEMSIZE[column.dtype]
    if whole and column.scales is not None:
        exact += (stop - first) * 4 / SCALE_BLOCK
        loaded += 4 * (-(-stop // SCALE_BLOCK) - first // SCALE_BLOCK)
    return int(exact), loaded


def _packed_bytes(column: Column, first: int, stop: int, whole: bool, size: int) -> tuple[int, int]:
    blocks = -(-stop // PACK_BLOCK) - first // PACK_BLOCK
    exact = (stop - first) / 8
    loaded = blocks * PACK_BLOCK // 8
    if whole:
        numbers = column.count * (stop - first) / size * ITEMSIZE[column.dtype]
        exact += numbers + (stop - first) * 4 / PACK_BLOCK
        loaded += int(numbers) + 4 * blocks
    return int(exact), loaded


def _table_bytes(launch: Launch) -> int:
    """Bytes of tables and weights that all programs of a launch read."""
    terms = launch.columns.shape[1]
    codes = launch.flags[launch.pieces[:, 5], :terms]  # of the span of each piece
    each = 4 + 8 * (PIECE_FIELDS - 1) + 4 * terms + 8 * terms  # weights, offsets of numbers
    if not launch.signature.codes:
        each += 4 * (terms + 1)
    some = 8 * ((codes & MASKED) != 0) + 4 * ((codes & SCALED) != 0) + 8 * ((codes & 3) == 3)
    some = some + 8 * ((codes & PACKED) != 0)
    return int((launch.counts * (each + some.sum(axis=1))).sum())
