"""What a merge over spans is, in plain numpy: the reference of every kernel that reads spans.

One element after the other in fp32, one operation after the other, in the order that
:mod:`mergesearch.merging.kernels.spans` states. bf16 is kept as its bits in uint16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.merging.kernels.spans import (
    ITEMSIZE,
    PACK_BLOCK,
    SCALE_BLOCK,
    Column,
    ColumnDtype,
    Span,
    pieces,
)

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

#: dtype of a column -> the numpy dtype that holds its numbers.
HELD_AS = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.float16,
    "float64": np.float64,
    "int8": np.int8,
}


@dataclass(frozen=True)
class Row:
    """What a column of a random arena is like."""

    dtype: ColumnDtype
    minus_base: bool = False
    scale: float = 1.0
    masked: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Stretch:
    """What a span of a random arena is like."""

    size: int
    base: ColumnDtype
    rows: tuple[Row, ...]
    shared: bool = False


def random_arena(
    generator: np.random.Generator, stretches: Sequence[Stretch], alignment: int = 64
) -> tuple[Bytes, tuple[Span, ...]]:
    """An arena of random numbers, and its spans, each starting at a multiple of 64 positions.

    The parts of the arena start at multiples of ``alignment`` bytes. Some numbers are -0.
    """
    parts: list[Bytes] = []
    used = 0

    def put(numbers: npt.NDArray[np.generic]) -> int:
        nonlocal used
        start = used
        held = np.frombuffer(numbers.tobytes(), np.uint8)
        parts.append(np.concatenate([held, np.zeros(-held.size % alignment, np.uint8)]))
        used += parts[-1].size
        return start

    spans = []
    at = 0
    for stretch in stretches:
        columns = [
            _random_column(generator, row, stretch.size, put)
            for row in (Row(stretch.base), *stretch.rows)
        ]
        spans.append(Span(at, at + stretch.size, columns[0], tuple(columns[1:]), stretch.shared))
        at += -(-stretch.size // 64) * 64
    return np.concatenate([np.zeros(0, np.uint8), *parts]), tuple(spans)


def decode(memory: Bytes, span: Span, term: int) -> Floats:
    """The fp32 numbers of a term of a span: term 0 is the base, the others are rows as decoded."""
    base = _numbers(memory, span, span.base)
    if term == 0:
        return base
    column = span.rows[term - 1]
    x = _numbers(memory, span, column)
    with np.errstate(all="ignore"):
        if column.minus_base:
            x = x - base
        if column.scale != 1:
            x = x * np.float32(column.scale)
        x = np.where(_kept(memory, span, column), x, np.float32(0))
        if span.shared:
            count = sum(
                (_kept(memory, span, row).astype(np.float32) for row in span.rows),
                start=np.zeros(x.size, np.float32),
            )
            x = x / np.maximum(count, np.float32(1))
    assert x.dtype == np.float32
    return x


def combine(
    memory: Bytes,
    spans: Sequence[Span],
    weights: Floats,
    boundaries: npt.NDArray[np.int64],
    dtype: str,
    election: str = "",
) -> npt.NDArray[np.generic]:
    """The merged numbers ``(boundaries[-1],)``; positions that no span has are 0.

    Args:
        memory: The arena.
        spans: Of the arena.
        weights: ``(K + 1, segments)``, base first.
        boundaries: ``(segments + 1,)``.
        dtype: Of the result; bf16 is returned as its bits in uint16.
        election: Rule, or empty for the weighted sum.
    """
    out = np.zeros(int(boundaries[-1]), np.float32)
    for piece in pieces(spans, boundaries):
        span = spans[piece.span]
        part = slice(piece.start - span.start, piece.stop - span.start)
        used = [
            (np.float32(weight), decode(memory, span, term)[part])
            for term, weight in enumerate(weights[:, piece.segment])
            if weight != 0
        ]
        with np.errstate(all="ignore"):
            total = _elected(used, election) if election else _sum(used)
        out[piece.start : piece.stop] = 0 if total is None else total
    return narrow(out, dtype)


def narrow(numbers: Floats, dtype: str) -> npt.NDArray[np.generic]:
    """Rounded once, to nearest, ties to even; every NaN of 16 bits is the canonical one."""
    if dtype == "float32":
        return numbers
    missing = np.isnan(numbers)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return np.where(missing, np.float16(np.nan), numbers.astype(np.float16))
    bits = numbers.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(missing, np.uint16(0x7FC0), rounded.astype(np.uint16))


def same_bits(one: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> bool:
    """Whether two arrays have one dtype and the same bits, any NaN being as good as another."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype == np.uint16:
        return one.tobytes() == other.tobytes()
    both = np.isnan(one) & np.isnan(other)
    return np.where(both, 0, one).tobytes() == np.where(both, 0, other).tobytes()


def _sum(used: Sequence[tuple[np.float32, Floats]]) -> Floats | None:
    total = None
    for weight, row in used:
        total = weight * row if total is None else total + weight * row
    return total


def _elected(used: Sequence[tuple[np.float32, Floats]], rule: str) -> Floats | None:
    """The base plus what its rows elect; the first term is the base, with weight 1."""
    zero = np.float32(0)
    base = used[0][1]
    total = _sum(used[1:])
    if total is None:
        return base
    sign = np.where(total > 0, np.float32(1), np.where(total < 0, np.float32(-1), zero))
    sign = sign + zero * total  # NaN where the sum is not finite
    kept = np.zeros_like(base)
    count = np.zeros_like(base)
    for weight, row in used[1:]:
        term = (weight * row) * sign
        agrees = term > 0
        if rule == "elect_max":
            kept = np.where(term > kept, term, kept)
            continue
        kept = kept + np.where(agrees, term, zero)
        count = count + np.where(
            agrees, abs(weight) if rule == "elect_weighted" else np.float32(1), zero
        )
    divides = rule in ("elect_mean", "elect_weighted")
    divisor = np.where(count > 0, count, np.float32(1)) if divides else np.ones_like(base)
    result: Floats = base + sign * (kept / divisor)
    return result


def _numbers(memory: Bytes, span: Span, column: Column) -> Floats:
    size = span.stop - span.start
    count = size if column.starts is None else column.count
    raw = memory[column.offset : column.offset + count * ITEMSIZE[column.dtype]]
    held = np.frombuffer(raw.tobytes(), HELD_AS[column.dtype])
    if column.starts is not None:
        held = _spread(memory, span, column, held)
    if column.dtype == "bfloat16":
        return (held.astype(np.uint32) << np.uint32(16)).view(np.float32)
    x = held.astype(np.float32)
    if column.scales is not None:
        blocks = -(-size // SCALE_BLOCK)
        part = memory[column.scales : column.scales + 4 * blocks]
        x = x * np.repeat(np.frombuffer(part.tobytes(), np.float32), SCALE_BLOCK)[:size]
    return x


def _spread(
    memory: Bytes, span: Span, column: Column, numbers: npt.NDArray[np.generic]
) -> npt.NDArray[np.generic]:
    """Packed numbers at the elements that are kept, found block by block; 0 elsewhere."""
    assert column.starts is not None
    kept = _kept(memory, span, column)
    part = memory[column.starts : column.starts + 4 * -(-kept.size // PACK_BLOCK)]
    spread = np.zeros(kept.size, numbers.dtype)
    for block, start in enumerate(np.frombuffer(part.tobytes(), np.int32)):
        places = block * PACK_BLOCK + np.flatnonzero(kept[block * PACK_BLOCK :][:PACK_BLOCK])
        spread[places] = numbers[start : start + places.size]
    return spread


def _kept(memory: Bytes, span: Span, column: Column) -> npt.NDArray[np.bool_]:
    size = span.stop - span.start
    if column.mask is None:
        return np.ones(size, np.bool_)
    part = memory[column.mask : column.mask + -(-size // 8)]
    return np.unpackbits(part, bitorder="little")[:size].astype(np.bool_)


def _random_column(generator: np.random.Generator, row: Row, size: int, put: object) -> Column:
    assert callable(put)
    numbers = generator.standard_normal(size, dtype=np.float32) * np.float32(0.02)
    numbers[generator.random(size) < 0.05] = -0.0
    scales = None
    held: npt.NDArray[np.generic]
    if row.dtype == "int8":
        held = generator.integers(-127, 128, size).astype(np.int8)
        blocks = -(-size // SCALE_BLOCK)
        scales = put(generator.random(blocks, dtype=np.float32) * np.float32(1e-3))
    elif row.dtype in ("bfloat16", "float16"):
        held = narrow(numbers, row.dtype)
    else:
        held = numbers.astype(HELD_AS[row.dtype])
    if row.packed:
        return _packed_column(generator, row, held, put)
    mask = put(generator.integers(0, 256, -(-size // 8)).astype(np.uint8)) if row.masked else None
    return Column(row.dtype, put(held), row.minus_base, row.scale, mask, scales)


def _packed_column(
    generator: np.random.Generator, row: Row, held: npt.NDArray[np.generic], put: object
) -> Column:
    """A third of the numbers, in runs: some blocks keep all of them, some none.

    What lies beyond the span has bits in the mask too, which nothing may follow.
    """
    assert callable(put)
    size = held.size
    share = np.repeat(generator.choice([0.0, 0.1, 1.0], -(-size // 100)), 100)[:size]
    kept = generator.random(size) < share
    blocks = -(-size // PACK_BLOCK)
    bits = np.ones(blocks * PACK_BLOCK, np.bool_)
    bits[:size] = kept
    per_block = np.add.reduceat(kept, np.arange(0, size, PACK_BLOCK), dtype=np.int32)
    starts = (np.cumsum(per_block) - per_block).astype(np.int32)
    numbers = put(held[kept])
    mask = put(np.packbits(bits, bitorder="little"))
    return Column(
        *(row.dtype, numbers, row.minus_base, row.scale, mask, None, put(starts)),
        count=int(kept.sum()),
    )
