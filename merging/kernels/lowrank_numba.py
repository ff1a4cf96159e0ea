"""Low-rank rows added to a base, compiled by numba: for contiguous fp32 in main memory.

``out = base + Σ_r (c_r · left[:, r]) ⊗ right[r]``, one multiplication and one addition per term, in
the order of r. A tile of the result stays in registers while all terms are added to it, which
numba's own code cannot do: a loop over rows of ``right`` loads and stores the result once per few
terms, and takes 2.5 times as long at 128 terms.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from mergesearch.merging.kernels.numba_kernel import (
    SHORTEST_TASK,
    TASKS_PER_THREAD,
    _pointer,
    compiled,
)

#: A tile: 4 rows of 16 columns are 8 sums of 8 lanes; with two operands they fill the 16 registers
#: of AVX2.
ROWS = 4
LANES = 8
VECTORS = 2
COLUMNS = LANES * VECTORS

#: Rows that use a panel of ``right`` while it is in the first-level cache, and columns whose panels
#: fit the second.
HEIGHT = 16
WIDTH = 512

Floats = npt.NDArray[np.float32]


def combine(
    base: Floats,
    left: Floats,
    right: Floats,
    owner: npt.NDArray[np.int64],
    weights: Floats,
    boundaries: npt.NDArray[np.int64],
    out: Floats,
    first: int,
    threads: int,
) -> None:
    """Write positions ``first : first + out.size`` of the matrix, row after row, into ``out``.

    Args:
        base: ``(m · n,)``; ``out`` may be the same memory.
        left: ``(m, R)``.
        right: ``(R, n)``.
        owner: ``(R,)``, the direction of each term.
        weights: ``(K, segments)``; a term whose weight is 0 is left out, any NaN or infinity gives
            NaN.
        boundaries: ``(segments + 1,)``, over all positions.
        out: ``(stop - first,)``.
        first: Position of ``out[0]``.
        threads: Number of CPU threads.
    """

    def stretch(limits: tuple[int, int]) -> None:
        _combine(base, left, right, owner, weights, boundaries, out, first, *limits)

    tasks = _tasks(first, first + out.size, right.shape[1], threads)
    if len(tasks) == 1:
        stretch(tasks[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(stretch, tasks))


def _tasks(start: int, stop: int, columns: int, threads: int) -> list[tuple[int, int]]:
    """Cut ``start..stop`` into stretches of whole blocks of rows, but for the ends."""
    if threads <= 1:
        return [(start, stop)]
    least = max(SHORTEST_TASK, -(-(stop - start) // (threads * TASKS_PER_THREAD)))
    step = -(-least // (HEIGHT * columns)) * HEIGHT * columns
    edges = [start, *range((start // step + 1) * step, stop, step), stop]
    return list(pairwise(edges))


@intrinsic  # type: ignore[untyped-decorator]
def _add_terms(
    _typing: Any,
    _base: Any,
    _pitch: Any,
    _out: Any,
    _out_pitch: Any,
    _left: Any,
    _right: Any,
    _n: Any,
) -> Any:
    """One tile: ``out = base + Σ_r left[r] ⊗ right[r]``.

    Addresses and pitches (bytes from row to row) are int64.

    ``left`` is packed ``(n, ROWS)`` and ``right`` ``(n, COLUMNS)``, with n ≥ 1 terms.
    """
    return types.void(*[types.int64] * 7), _generate_tile


def _generate_tile(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
    base, pitch, out, out_pitch, left, right, terms = arguments
    before, body, after = (
        builder.block,
        *(builder.append_basic_block(name) for name in ("terms", "done")),
    )
    start = [
        builder.load(_tile_vector(builder, base, pitch, vector), align=4)
        for vector in _VECTORS_OF_TILE
    ]
    builder.branch(body)

    builder.position_at_end(body)
    term = builder.phi(_INT)
    sums = [builder.phi(_VECTOR) for _ in _VECTORS_OF_TILE]
    columns = _address(builder, right, term, COLUMNS * 4)
    row = [
        builder.load(_vector_at(builder, columns, v * LANES * 4), align=4) for v in range(VECTORS)
    ]
    factors = _address(builder, left, term, ROWS * 4)
    factor = [_broadcast(builder, factors, i * 4) for i in range(ROWS)]
    # No fast-math flag: the two instructions stay apart, each with its own rounding.
    added = [
        builder.fadd(s, builder.fmul(factor[i], row[v]))
        for s, (i, v) in zip(sums, _VECTORS_OF_TILE, strict=True)
    ]
    following = builder.add(term, _INT(1))
    builder.cbranch(builder.icmp_signed("<", following, terms), body, after)
    for phi, first, later in zip(
        (term, *sums), (_INT(0), *start), (following, *added), strict=True
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(later, body)

    builder.position_at_end(after)
    for value, vector in zip(added, _VECTORS_OF_TILE, strict=True):
        builder.store(value, _tile_vector(builder, out, out_pitch, vector), align=4)
    return context.get_dummy_value()


_INT = ir.IntType(64)
_LANE = ir.FloatType()
_VECTOR = ir.VectorType(_LANE, LANES)
#: Row, and number in the row, of every vector of a tile.
_VECTORS_OF_TILE = [(i, v) for i in range(ROWS) for v in range(VECTORS)]


def _address(builder: Any, start: Any, index: Any, size: int) -> Any:
    return builder.add(start, builder.mul(index, _INT(size)))


def _vector_at(builder: Any, address: Any, offset: int) -> Any:
    return builder.inttoptr(builder.add(address, _INT(offset)), _VECTOR.as_pointer())


def _tile_vector(builder: Any, start: Any, pitch: Any, vector: tuple[int, int]) -> Any:
    row, number = vector
    return _vector_at(
        builder, builder.add(start, builder.mul(pitch, _INT(row))), number * LANES * 4
    )


def _broadcast(builder: Any, address: Any, offset: int) -> Any:
    number = builder.load(
        builder.inttoptr(builder.add(address, _INT(offset)), _LANE.as_pointer()), align=4
    )
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.IntType(32)(0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), everywhere)


_READ = types.Array(types.float32, 1, "C", readonly=True)
_READ2 = types.Array(types.float32, 2, "C", readonly=True)
_INDEX = types.Array(types.int64, 1, "C", readonly=True)
_WRITE = types.Array(types.float32, 1, "C")
_AT = types.int64


@compiled(types.void(_WRITE, _READ2, types.int64[::1], _AT, _AT, _AT))
def _pack_right(
    panels: Floats, right: Floats, used: Any, terms: int, left_edge: int, right_edge: int
) -> None:
    """Columns ``left_edge:right_edge`` as panels ``(terms, COLUMNS)``.

    The last panel is filled up with zeros.
    """
    at = 0
    for column in range(left_edge, right_edge, COLUMNS):
        width = min(COLUMNS, right_edge - column)
        for r in range(terms):
            for j in range(COLUMNS):
                panels[at + j] = right[used[r], column + j] if j < width else np.float32(0)
            at += COLUMNS


@compiled(types.void(_WRITE, _READ2, types.int64[::1], types.float32[::1], _AT, _AT, _AT))
def _pack_left(
    packed: Floats, left: Floats, used: Any, scales: Floats, terms: int, top: int, bottom: int
) -> None:
    """Rows ``top:bottom``, scaled, as blocks ``(terms, ROWS)``.

    The last block is filled up with zeros.
    """
    at = 0
    for row in range(top, bottom, ROWS):
        for r in range(terms):
            for i in range(ROWS):
                packed[at + i] = (
                    scales[r] * left[row + i, used[r]] if row + i < bottom else np.float32(0)
                )
            at += ROWS


@compiled(types.void(_AT, _AT, _AT, _AT, _AT, _AT, _AT, _AT, types.float32[::1]))
def _edge_tile(
    base: int,
    out: int,
    pitch: int,
    rows: int,
    columns: int,
    left: int,
    right: int,
    terms: int,
    spare: Floats,
) -> None:
    """A tile at the edge of the matrix, computed in a whole tile of scratch memory."""
    for i in range(rows):
        row = numba.carray(_pointer(base + i * pitch), columns)
        for j in range(columns):
            spare[i * COLUMNS + j] = row[j]
    tile = spare.ctypes.data
    _add_terms(tile, COLUMNS * 4, tile, COLUMNS * 4, left, right, terms)
    for i in range(rows):
        target = numba.carray(_pointer(out + i * pitch), columns)
        for j in range(columns):
            target[j] = spare[i * COLUMNS + j]


_SCRATCH = types.Tuple([types.float32[::1]] * 3)


@compiled(
    types.void(
        *(_AT, _AT, _READ2, _READ2, types.int64[::1], types.float32[::1], _AT),
        *(_AT, _AT, _AT, _AT),
        _SCRATCH,
    )
)
def _rectangle(
    base: int,
    out: int,
    left: Floats,
    right: Floats,
    used: Any,
    scales: Floats,
    terms: int,
    top: int,
    bottom: int,
    left_edge: int,
    right_edge: int,
    scratch: tuple[Floats, Floats, Floats],
) -> None:
    """Rows ``top:bottom``, columns ``left_edge:right_edge`` of the result.

    ``base`` and ``out`` are addresses of the whole matrix.
    """
    panels, packed, spare = scratch
    pitch = right.shape[1] * 4
    for block in range(left_edge, right_edge, WIDTH):
        block_end = min(block + WIDTH, right_edge)
        _pack_right(panels, right, used, terms, block, block_end)
        for strip in range(top, bottom, HEIGHT):
            strip_end = min(strip + HEIGHT, bottom)
            _pack_left(packed, left, used, scales, terms, strip, strip_end)
            panel = panels.ctypes.data
            for column in range(block, block_end, COLUMNS):
                factors = packed.ctypes.data
                for row in range(strip, strip_end, ROWS):
                    rows = min(ROWS, strip_end - row)
                    columns = min(COLUMNS, block_end - column)
                    offset = row * pitch + column * 4
                    if rows == ROWS and columns == COLUMNS:
                        _add_terms(base + offset, pitch, out + offset, pitch, factors, panel, terms)
                    else:
                        _edge_tile(
                            base + offset,
                            out + offset,
                            pitch,
                            rows,
                            columns,
                            factors,
                            panel,
                            terms,
                            spare,
                        )
                    factors += terms * ROWS * 4
                panel += terms * COLUMNS * 4


@compiled(
    types.void(*(_READ, _READ2, _READ2, _INDEX, _READ2, _INDEX, _WRITE, _AT, _AT, _AT)), nogil=True
)
def _combine(
    base: Floats,
    left: Floats,
    right: Floats,
    owner: Any,
    weights: Floats,
    boundaries: Any,
    out: Floats,
    first: int,
    start: int,
    stop: int,
) -> None:
    """The stretch ``start:stop``, segment by segment, each as at most three rectangles."""
    rank, n = right.shape
    at = base.ctypes.data
    to = out.ctypes.data - first * 4
    used = np.empty(rank, np.int64)
    scales = np.empty(rank, np.float32)
    scratch = (
        np.empty(rank * WIDTH, np.float32),
        np.empty(rank * HEIGHT, np.float32),
        np.zeros(ROWS * COLUMNS, np.float32),
    )
    segment = np.searchsorted(boundaries, start, side="right") - 1
    while start < stop:
        end = min(boundaries[segment + 1], stop)
        terms = 0
        for r in range(rank):
            if weights[owner[r], segment] != 0:
                scales[terms] = weights[owner[r], segment]
                used[terms] = r
                terms += 1
        if not np.isfinite(weights[:, segment]).all():
            out[start - first : end - first] = np.nan
            start = end
        elif terms == 0:
            out[start - first : end - first] = base[start:end]
            start = end
        while start < end:
            row = start // n
            column = start % n
            rows = max((end - start) // n, 1) if column == 0 else 1
            edge = min(column + end - start, n)
            _rectangle(
                at, to, left, right, used, scales, terms, row, row + rows, column, edge, scratch
            )
            start += rows * (edge - column)
        segment += 1
