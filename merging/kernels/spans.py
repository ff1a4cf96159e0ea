"""What a merge reads: spans of the flat index, and for every term of a span how it is stored.

An arena is one block of bytes. Each span is a stretch of positions whose terms are all stored in
the same way; a kernel decodes them in registers or in the first-level cache, in the order of the
terms, so that the merged bits are those of fp32 rows. The decoded row of a column is, in fp32 and
in this order::

    x = number                     widened to fp32 (int8: number · scales[i // 128]; packed: number
                                   starts[i // 64] + kept elements of its block before i)
    x = x − base                   if ``minus_base``
    x = x · scale                  if ``scale`` is not 1
    x = 0                          where a mask says so
    x = x / count                  if the span is ``shared``: count = rows whose mask keeps i, ≥ 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

#: How the numbers of a column are stored.
ColumnDtype = Literal["float32", "bfloat16", "float16", "float64", "int8"]

#: How a study may have rows kept: the rule, or one encoding for all rows that it can express.
RowsSetting = Literal["auto", "stored", "masked", "packed", "dense", "bf16", "int8"]

#: Bytes of a number.
ITEMSIZE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1}

#: Positions of the flat index, int64 ``(ranges, 2)``: starts and stops, in order and apart.
Ranges = npt.NDArray[np.int64]

#: Elements that share one scale of int8 numbers, counted from the start of the span.
SCALE_BLOCK = 128

#: Elements that share one start of packed numbers, counted from the start of the span.
PACK_BLOCK = 64


def _packed_bits(dtype: str, density: float) -> float:
    """Numbers of what is kept, one bit an element, and its part of a start; or what masked takes.

    Of fp32 experts it is what dense takes, which has no mask.
    """
    whole = 8.0 * ITEMSIZE[dtype]
    return min(whole * density + 1 + 32 / PACK_BLOCK, whole + (dtype != "float32"))


#: Encoding -> dtype of the expert, share of elements that a row keeps -> bits that an element of a
#: row takes.
ROW_BITS: Mapping[str, Callable[[str, float], float]] = {
    "stored": lambda dtype, _density: 8.0 * ITEMSIZE[dtype],
    "masked": lambda dtype, _density: 8.0 * ITEMSIZE[dtype] + 1,
    "packed": _packed_bits,
    "dense": lambda _dtype, _density: 32.0,
    "bf16": lambda _dtype, _density: 16.0,
    "int8": lambda _dtype, _density: 8.0 + 32.0 / SCALE_BLOCK,
}


class Stretch(Protocol):
    """What has a first position, and one after the last."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


@dataclass(frozen=True)
class Column:
    """How one term of a span is stored; offsets are bytes from the start of the arena.

    Attributes:
        dtype: Of the numbers.
        offset: Of the first number of the span.
        minus_base: Whether the row is the number minus the base, as for a stored expert.
        scale: What the row is multiplied with, an fp32 number; 1 leaves it.
        mask: Of the first byte of the row's bits, or None: bit ``i % 8`` of byte ``i // 8`` says
            whether element i of the span is kept; where it is 0 the row is 0.
        scales: Of the fp32 scales of ``int8`` numbers, one per :data:`SCALE_BLOCK`, or None.
        starts: Where only numbers of elements that the mask keeps are stored, *packed*, one after
            the other: of the int32 starts, one per :data:`PACK_BLOCK`, each the number of kept
            elements before the block. None where every element has its number.
        count: Numbers that are stored, where they are packed; else 0.
    """

    dtype: ColumnDtype
    offset: int
    minus_base: bool = False
    scale: float = 1.0
    mask: int | None = None
    scales: int | None = None
    starts: int | None = None
    count: int = 0


@dataclass(frozen=True)
class Span:
    """Positions ``start:stop`` of the flat index whose terms are all stored alike.

    Attributes:
        start: First position, a multiple of 64.
        stop: Position after the last.
        base: Column of the base: never masked, scaled or ``minus_base``.
        rows: Columns of the K rows.
        shared: Whether every row is divided by the number of rows that keep the position, at least
            1 (the disjoint mean of TIES).
    """

    start: int
    stop: int
    base: Column
    rows: tuple[Column, ...]
    shared: bool = False


@dataclass(frozen=True)
class Piece:
    """A stretch of a span within one segment of coefficients.

    Attributes:
        span: Number of the span.
        segment: Number of the segment.
        start, stop: Positions of the flat index.
    """

    span: int
    segment: int
    start: int
    stop: int


def pieces(
    spans: Sequence[Span], boundaries: npt.NDArray[np.int64], only: Ranges | None = None
) -> list[Piece]:
    """Spans cut where segments end, in the order of the flat index; nothing is left out.

    Args:
        spans: In the order of the flat index.
        boundaries: Of the segments ``(segments + 1,)``.
        only: Positions that are meant, where these are not all.
    """
    table = piece_table(limits_of(spans), boundaries, only)
    return [Piece(*row) for row in table.tolist()]


def piece_table(
    limits: Ranges, boundaries: npt.NDArray[np.int64], only: Ranges | None = None
) -> npt.NDArray[np.int64]:
    """The :func:`pieces` of spans as numbers ``(pieces, 4)``: span, segment, start, stop.

    Args:
        limits: Of the spans.
        boundaries: Of the segments ``(segments + 1,)``.
        only: Positions that are meant, where these are not all.
    """
    meant = limits if only is None else only
    # Three runs in order, which this kind of sort merges.
    edges = np.sort(np.concatenate((boundaries, limits.ravel(), meant.ravel())), kind="stable")
    starts = edges[:-1]
    kept = (starts < edges[1:]) & holding(limits, starts)
    if only is not None:
        kept &= holding(only, starts)
    starts = starts[kept]
    table = np.empty((len(starts), 4), np.int64)
    table[:, 0] = np.searchsorted(limits[:, 0], starts, side="right") - 1
    table[:, 1] = np.searchsorted(boundaries, starts, side="right") - 1
    table[:, 2] = starts
    table[:, 3] = edges[1:][kept]
    return table


def limits_of(stretches: Sequence[Stretch]) -> Ranges:
    """First positions of stretches, and those after the last: ``(stretches, 2)``."""
    return np.array([(one.start, one.stop) for one in stretches], np.int64).reshape(-1, 2)


def holding(ranges: Ranges, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether some range holds each position."""
    following = np.searchsorted(ranges[:, 1], positions, side="right")
    starts = np.append(ranges[:, 0], np.iinfo(np.int64).max)
    held: npt.NDArray[np.bool_] = starts[following] <= positions
    return held
