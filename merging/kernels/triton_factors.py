"""Low-rank rows added to a base by Triton: ``base + Σ_r (c_r · left[:, r]) ⊗ right[r]``.

The bits are those of :func:`mergesearch.merging.kernels.lowrank.combine_factors`: terms in the
order of r, each a multiplication and an addition in fp32, terms of weight 0 left out, NaN where any
weight of the segment is not finite, one rounding at the end. A tile of the result stays in
registers while all terms are added to it.

All matrices of a merge are in one table: a launch for each dtype of a base, and for matrices whose
rows are not whole vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from mergesearch.merging.errors import InputError
from mergesearch.merging.kernels.spans import Column
from mergesearch.merging.kernels.triton_blocks import Tables, code, piece_of_blocks
from mergesearch.merging.kernels.triton_decode import (
    OPTIONS,
    STORED,
    check_arrays,
    is_used,
    narrowed,
    widened,
)

#: A tile: rows by columns.
HEIGHT = 64
WIDTH = 128

#: What a program reads of its piece: first tile, tiles side by side, first row, first and last
#: element that are the piece's, position and width of the matrix, offsets of base, left and right,
#: number of its first owner, terms, segment.
PIECE_FIELDS = 13

_HEIGHT = tl.constexpr(HEIGHT)
_WIDTH = tl.constexpr(WIDTH)
_PIECE_FIELDS = tl.constexpr(PIECE_FIELDS)


@dataclass(frozen=True)
class Matrix:
    """One tensor whose rows are kept as factors; offsets are bytes from the start of the arena.

    Attributes:
        start: Position of its first element.
        rows, columns: Its shape as a matrix.
        base: How its base is stored.
        left: Of the left factor, fp32 ``(rows, R)``.
        right: Of the right factor, fp32 ``(R, columns)``.
        owner: Direction of each of the R terms.
    """

    start: int
    rows: int
    columns: int
    base: Column
    left: int
    right: int
    owner: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Launch:
    """The tables of one launch on the device; whole vectors are loaded where it is ``aligned``."""

    code: int
    aligned: bool
    tiles: int
    piece_of: torch.Tensor
    pieces: torch.Tensor
    owners: torch.Tensor


def combine(
    memory: torch.Tensor,
    matrices: Sequence[Matrix],
    weights: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.int64],
    out: torch.Tensor,
    *,
    tables: Tables | None = None,
) -> None:
    """Write base plus weighted low-rank products into the positions of all matrices.

    Args:
        memory: The arena, uint8 on the device.
        matrices: What to read.
        weights: fp32 ``(K, segments)``.
        boundaries: ``(segments + 1,)``, the last is n.
        out: ``(n,)``, fp32, bf16 or fp16 on the device.
        tables: What is kept between merges of the same matrices.

    Raises:
        InputError: If a base is in fp64 or int8, or the arrays do not fit each other.
    """
    _check(memory, matrices, weights, boundaries, out)
    if not matrices:
        return
    poison = np.where(np.isfinite(weights).all(axis=0), 0, np.nan).astype(np.float32)
    kept = Tables() if tables is None else tables
    with torch.cuda.device_of(memory):  # type: ignore[no-untyped-call]
        device_weights = torch.from_numpy(np.vstack([weights, poison])).to(memory.device)
        launches = kept.of(
            matrices,
            boundaries,
            ("factors", memory.device),
            lambda: _launches(matrices, boundaries, memory.device),
        )
        for launch in launches:
            _launch(launch, memory, device_weights, out)


def _launch(
    tables: _Launch, memory: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
) -> None:
    _tile[(tables.tiles,)](
        memory,
        out if out.dtype == torch.float32 else out.view(torch.int16),
        weights,
        tables.piece_of,
        tables.pieces,
        tables.owners,
        weights.shape[1],
        weights.shape[0] - 1,
        CODE=tables.code,
        ALIGNED=tables.aligned,
        KIND=STORED[out.dtype],
        **OPTIONS,
    )


def _launches(
    matrices: Sequence[Matrix], boundaries: npt.NDArray[np.int64], device: torch.device
) -> list[_Launch]:
    groups: dict[tuple[int, bool], list[Matrix]] = {}
    for matrix in matrices:
        whole = matrix.columns % 8 == 0
        whole = whole and all(n % 16 == 0 for n in (matrix.base.offset, matrix.right))
        groups.setdefault((code(matrix.base), whole), []).append(matrix)
    result = []
    for (stored, aligned), members in groups.items():
        pieces, owners, counts = _pieces(members, boundaries)
        result.append(
            _Launch(
                stored,
                aligned,
                int(counts.sum()),
                piece_of_blocks(counts, device),
                torch.from_numpy(pieces).to(device),
                torch.from_numpy(owners).to(device),
            )
        )
    return result


def _pieces(
    matrices: Sequence[Matrix], boundaries: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Table of pieces, owners of all terms, and the number of tiles of each piece."""
    rows = []
    owners: list[int] = []
    counts: list[int] = []
    for matrix in matrices:
        width = matrix.columns
        stop = matrix.start + matrix.rows * width
        first = int(np.searchsorted(boundaries, matrix.start, side="right")) - 1
        last = int(np.searchsorted(boundaries, stop, side="left"))
        across = -(-width // WIDTH)
        for segment in range(first, last):
            low = max(int(boundaries[segment]), matrix.start) - matrix.start
            high = min(int(boundaries[segment + 1]), stop) - matrix.start
            top = low // width
            limits = (sum(counts), across, top, low, high, matrix.start, width)
            places = (matrix.base.offset, matrix.left, matrix.right, len(owners))
            rows.append((*limits, *places, len(matrix.owner), segment))
            counts.append(-(-(-(-high // width) - top) // HEIGHT) * across)
        owners.extend(matrix.owner)
    return (
        np.array(rows, np.int64).reshape(-1, PIECE_FIELDS),
        np.array(owners, np.int32),
        np.array(counts, np.int64),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _tile(
    memory: tl.tensor,
    out: tl.tensor,
    weights: tl.tensor,
    piece_of: tl.tensor,
    pieces: tl.tensor,
    owners: tl.tensor,
    segments: tl.tensor,
    directions: tl.tensor,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """One tile of one piece."""
    number = tl.program_id(0)
    piece = pieces + tl.load(piece_of + number).to(tl.int64) * _PIECE_FIELDS
    number = number - tl.load(piece)
    across = tl.load(piece + 1)
    width = tl.load(piece + 6)
    if ALIGNED:
        width = tl.multiple_of(width, 8)
    top = tl.load(piece + 2) + number // across * _HEIGHT
    edge = number % across * _WIDTH
    first = tl.load(piece + 3)
    stop = tl.load(piece + 4)
    rows = top + tl.arange(0, _HEIGHT)[:, None]
    columns = edge + tl.arange(0, _WIDTH)[None, :]
    at = rows * width + columns
    target = out + tl.multiple_of(tl.load(piece + 5), 64)
    last = (top + _HEIGHT - 1) * width + edge + _WIDTH
    if (top * width + edge >= first) & (last <= stop) & (edge + _WIDTH <= width):
        everywhere = tl.full((_HEIGHT, _WIDTH), 1, tl.int32) != 0
        in_row = tl.full((_HEIGHT, 1), 1, tl.int32) != 0
        in_column = tl.full((1, _WIDTH), 1, tl.int32) != 0
        place = (at, rows, columns, everywhere, in_row, in_column)
        total = _total(memory, weights, owners, piece, segments, directions, place, CODE, ALIGNED)
        tl.store(target + at, narrowed(total, KIND))
    else:
        in_row = rows * width < stop
        in_column = columns < width
        inside = (at >= first) & (at < stop) & in_column
        place = (at, rows, columns, inside, in_row, in_column)
        total = _total(memory, weights, owners, piece, segments, directions, place, CODE, ALIGNED)
        tl.store(target + at, narrowed(total, KIND), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _total(
    memory: tl.tensor,
    weights: tl.tensor,
    owners: tl.tensor,
    piece: tl.tensor,
    segments: tl.tensor,
    directions: tl.tensor,
    place: tl.tensor,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """The sum of a tile in fp32, ``(HEIGHT, WIDTH)``."""
    at, rows, columns, inside, in_row, in_column = place
    width = tl.load(piece + 6)
    base = tl.load(piece + 7)
    right_offset = tl.load(piece + 9)
    if ALIGNED:
        width = tl.multiple_of(width, 8)
        base = tl.multiple_of(base, 16)
        right_offset = tl.multiple_of(right_offset, 16)
    left = (memory + tl.load(piece + 8)).to(tl.pointer_type(tl.float32))
    right = (memory + right_offset).to(tl.pointer_type(tl.float32))
    owners += tl.load(piece + 10)
    terms = tl.load(piece + 11)
    weights += tl.load(piece + 12)
    total = widened(memory + base, at, inside, CODE)
    for r in range(terms):
        weight = tl.load(weights + tl.load(owners + r) * segments)
        if is_used(weight):
            one = tl.load(left + rows * terms + r, mask=in_row, other=0.0) * weight
            other = tl.load(right + r * width + columns, mask=in_column, other=0.0)
            total = total + one * other
    poison = tl.load(weights + directions * segments)  # 0, or NaN
    return tl.where(poison == poison, total, float("nan"))


def _check(
    memory: torch.Tensor,
    matrices: Sequence[Matrix],
    weights: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.int64],
    out: torch.Tensor,
) -> None:
    check_arrays(memory, out, int(boundaries[-1]))
    for matrix in matrices:
        if code(matrix.base) > 2:
            raise InputError(
                f"triton: expected a plain base in fp32, bf16 or fp16, received {matrix.base}"
            )
        if matrix.start % 64 or matrix.left % 4 or matrix.right % 4:
            raise InputError(
                f"triton: expected matrices at multiples of 64 elements and factors at multiples "
                f"of 4 bytes, received {matrix.start}, {matrix.left} and {matrix.right}"
            )
        if any(not 0 <= k < len(weights) for k in matrix.owner):
            raise InputError(
                f"triton: expected owners below {len(weights)}, received {matrix.owner}"
            )
    if weights.dtype != np.float32 or weights.shape[1] != len(boundaries) - 1:
        raise InputError(
            f"triton: expected fp32 weights (K, {len(boundaries) - 1}), received {weights.dtype} "
            f"{weights.shape}"
        )
