"""The rows of a span in registers: what is read of a chunk, and how a row is worked out from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from numba.core import cgutils

from mergesearch.merging.kernels.chunks.columns import (
    CHUNK,
    FIELDS,
    FLOAT,
    INT,
    KINDS,
    MASKED,
    MINUS_BASE,
    PACKED,
    SCALED,
    SHARED,
    VECTORS,
    Code,
    Values,
    kept,
    load,
    read,
    variables,
    where,
    widen,
    widened,
    write,
)
from mergesearch.merging.kernels.chunks.narrow import float_constant, splat
from mergesearch.merging.kernels.chunks.spread import (
    SpreadRoom,
    expanded,
    expands,
    spread,
    spread_room,
)

#: Operation of a base that is not read.
UNREAD = -1

#: Operations that have code of their own; the others are put together by branches.
_COMMON = (
    KINDS["bfloat16"] + MINUS_BASE,
    KINDS["bfloat16"] + MINUS_BASE + MASKED,
    KINDS["bfloat16"] + MINUS_BASE + MASKED + SCALED,
    KINDS["bfloat16"] + MINUS_BASE + MASKED + SHARED,
    KINDS["bfloat16"],
    KINDS["float32"],
    KINDS["float32"] + MINUS_BASE,
    KINDS["int8"],
)
#: And those where numbers are expanded in registers.
_EXPANDED = tuple(
    PACKED + KINDS["bfloat16"] + MINUS_BASE + MASKED + bit for bit in (0, SCALED, SHARED)
)


@dataclass(frozen=True)
class Call:
    """The arguments of a call, all int64.

    Attributes:
        terms: Address of the terms ``(1 + count, FIELDS)``, int64, base first.
        scalars: Address of their weights and scales ``(1 + count, 2)``, fp32.
        count: Number of rows.
        masks: Address of the addresses of all masks of a shared span, 0 for none.
        mask_count: Their number; 0 if the span is not shared.
        first, last: Chunks of the span.
        out: Address of the result at the start of the span.
        kind: Of the result's numbers.
        rule: Of an election, or of a sum that is made in parts.
        scratch: Address of room for the terms of an election, ``(count, CHUNK)``, or for what a sum
            in parts has come to, ``(last - first, CHUNK)``; fp32.
    """

    terms: Any
    scalars: Any
    count: Any
    masks: Any
    mask_count: Any
    first: Any
    last: Any
    out: Any
    kind: Any
    rule: Any
    scratch: Any


@dataclass(frozen=True)
class Room:
    """Variables of a chunk: base and row, and by how many rows a position is shared.

    And memory for packed numbers, spread over the chunk.
    """

    base: Values
    row: Values
    sharing: Values
    spread: SpreadRoom


def make_room(code: Code) -> Room:
    """Room for a chunk."""
    return Room(variables(code), variables(code), variables(code), spread_room(code))


@contextmanager
def rows_of(code: Code, call: Call) -> Iterator[tuple[Any, Any, Any]]:
    """A loop over the rows: addresses of the term, its weight and scale, and its scratch memory."""
    builder = code.builder
    with cgutils.for_range(builder, call.count) as rows:
        row = builder.add(rows.index, INT(1))
        term = builder.add(call.terms, builder.mul(row, INT(8 * FIELDS)))
        scalars = builder.add(call.scalars, builder.mul(row, INT(8)))
        yield term, scalars, builder.add(call.scratch, builder.mul(rows.index, INT(4 * CHUNK)))


def open_chunk(code: Code, call: Call, chunk: Any, room: Room, reads: Any) -> None:
    """Widen the base, unless it is not read, and count who shares a position."""
    builder = code.builder
    if reads is None:
        widen(code, call.terms, load(code, call.terms, INT), chunk, room.base)
    else:
        with builder.if_then(reads):
            widen(code, call.terms, load(code, call.terms, INT), chunk, room.base)
    with builder.if_then(builder.icmp_signed("!=", call.mask_count, INT(0))):
        _count_sharing(code, call, chunk, room.sharing)


def _count_sharing(code: Code, call: Call, chunk: Any, sharing: Values) -> None:
    """How many rows keep each element, at least 1, as fp32."""
    builder = code.builder
    one = float_constant(1.0)
    write(code, sharing, [float_constant(0.0)] * VECTORS)
    with cgutils.for_range(builder, call.mask_count) as rows:
        mask = load(code, builder.add(call.masks, builder.mul(rows.index, INT(8))), INT)
        unmasked = builder.icmp_signed("==", mask, INT(0))
        with builder.if_else(unmasked) as (then, otherwise):
            with then:
                more = [one] * VECTORS
                write(code, sharing, sums(code, read(code, sharing), more))
            with otherwise:
                more = where(code, kept(code, mask, chunk), [one] * VECTORS, float_constant(0.0))
                write(code, sharing, sums(code, read(code, sharing), more))
    counts = read(code, sharing)
    several = [builder.fcmp_ordered(">", count, one) for count in counts]
    write(code, sharing, where(code, several, counts, one))


def sums(code: Code, one: Values, other: Values) -> list[Any]:
    return [code.builder.fadd(a, b) for a, b in zip(one, other, strict=True)]


def with_row(
    code: Code,
    term: Any,
    scalars: Any,
    chunk: Any,
    room: Room,
    use: Callable[[list[Any]], None],
) -> None:
    """Use the values of a row; the common operations have no branch inside."""
    builder = code.builder
    operation = load(code, term, INT)
    done = builder.append_basic_block("used")
    other = builder.append_basic_block("other")
    switch = builder.switch(operation, other)
    for known in (*_COMMON, *_EXPANDED) if expands() else _COMMON:
        block = builder.append_basic_block(f"operation{known}")
        switch.add_case(INT(known), block)
        builder.position_at_end(block)
        source = expanded(code, known & 3, term, chunk) if known & PACKED else None
        values = widened(code, known & 3, term, chunk, source)
        for bit, step in _steps(code, term, scalars, chunk, room):
            if known & bit:
                values = step(values)
        use(values)
        builder.branch(done)
    builder.position_at_end(other)
    _decode(code, _without_packing(code, term, chunk, room), scalars, chunk, room)
    use(read(code, room.row))
    builder.branch(done)
    builder.position_at_end(done)


def _without_packing(code: Code, term: Any, chunk: Any, room: Room) -> Any:
    """The term, or one whose numbers of this chunk lie where those of all elements do."""
    builder = code.builder
    packed = builder.and_(load(code, term, INT), INT(PACKED))
    is_packed = builder.icmp_signed("!=", packed, INT(0))
    with builder.if_then(is_packed):
        spread(code, term, chunk, room.spread)
    return builder.select(is_packed, room.spread.term, term)


def _decode(code: Code, term: Any, scalars: Any, chunk: Any, room: Room) -> None:
    """A row as its span defines it, written to ``room.row``."""
    builder = code.builder
    operation = load(code, term, INT)
    widen(code, term, operation, chunk, room.row)
    for bit, step in _steps(code, term, scalars, chunk, room):
        applies = builder.icmp_signed("!=", builder.and_(operation, INT(bit)), INT(0))
        with builder.if_then(applies):
            write(code, room.row, step(read(code, room.row)))


def _steps(
    code: Code, term: Any, scalars: Any, chunk: Any, room: Room
) -> tuple[tuple[int, Callable[[list[Any]], list[Any]]], ...]:
    """What the bits of an operation stand for, in the order of the operations."""
    return (
        (MINUS_BASE, lambda values: _minus_base(code, values, room)),
        (SCALED, lambda values: _scaled(code, values, scalars)),
        (MASKED, lambda values: _masked(code, values, term, chunk)),
        (SHARED, lambda values: _divided(code, values, room)),
    )


def _minus_base(code: Code, values: Values, room: Room) -> list[Any]:
    pairs = zip(values, read(code, room.base), strict=True)
    return [code.builder.fsub(value, base) for value, base in pairs]


def _scaled(code: Code, values: Values, scalars: Any) -> list[Any]:
    scale = splat(code.builder, load(code, scalars, FLOAT, 4))
    return [code.builder.fmul(value, scale) for value in values]


def _masked(code: Code, values: Values, term: Any, chunk: Any) -> list[Any]:
    mask = load(code, term, INT, 16)
    return where(code, kept(code, mask, chunk), values, float_constant(0.0))


def _divided(code: Code, values: Values, room: Room) -> list[Any]:
    pairs = zip(values, read(code, room.sharing), strict=True)
    return [code.builder.fdiv(value, count) for value, count in pairs]
