"""How vector code for numba reads a chunk of a stored column into registers, and writes a result.

The elements of a chunk lie in its four vectors in one of two orders. The natural one is that of the
memory. In *pairs* each group of 32 elements is one vector of the even and one of the odd ones: two
16-bit numbers are then widened by a shift and a mask, and narrowed without moving any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

from mergesearch.merging.kernels.chunks.narrow import (
    FLOATS,
    INTS,
    LANES,
    int_constant,
    narrowed_bf16,
    narrowed_fp16,
    splat,
    widened_fp16,
)

#: Elements of a chunk; chunks are counted from the start of the span.
CHUNK = 64
VECTORS = CHUNK // LANES

#: Kinds of numbers, as the lower bits of an operation and as the kind of a result, and their bytes.
KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
ITEM_BYTES = (4, 2, 2, 1)

#: The other bits of an operation, in the order in which a row is worked out.
MINUS_BASE = 4
SCALED = 8
MASKED = 16
SHARED = 32

#: The bit of an operation whose numbers are packed; they are spread before anything else.
PACKED = 64

#: Numbers of a term: operation, addresses of numbers, mask, scales and starts at the start of the
#: span.
FIELDS = 5

INT = ir.IntType(64)
FLOAT = ir.FloatType()

HALVES = ir.VectorType(ir.IntType(16), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)

#: What lies in a chunk, as a vector of a kind, at so many bytes from its start.
Source = Callable[[Any, int], Any]

#: A vector for each quarter of a chunk: values, or the addresses of variables that hold them.
Values = Sequence[Any]


@dataclass(frozen=True)
class Code:
    """Where instructions go, and the order of the elements that they are for."""

    builder: Any
    pairs: bool


def variables(code: Code) -> list[Any]:
    """Room for a chunk; LLVM keeps it in registers."""
    return [cgutils.alloca_once(code.builder, FLOATS) for _ in range(VECTORS)]


def read(code: Code, held: Values) -> list[Any]:
    """The values of variables."""
    return [code.builder.load(variable) for variable in held]


def write(code: Code, held: Values, values: Values) -> None:
    """Give variables their values."""
    for variable, value in zip(held, values, strict=True):
        code.builder.store(value, variable)


def load(code: Code, address: Any, kind: Any, offset: int = 0) -> Any:
    """What is at an address, an int64; columns may begin at any byte."""
    at = code.builder.add(address, INT(offset))
    return code.builder.load(code.builder.inttoptr(at, kind.as_pointer()), align=1)


def keep(code: Code, address: Any, value: Any, offset: int = 0) -> None:
    """Write a value to scratch memory."""
    at = code.builder.add(address, INT(offset))
    code.builder.store(value, code.builder.inttoptr(at, value.type.as_pointer()), align=1)


def choose(code: Code, number: Any, cases: Sequence[Callable[[], None]]) -> None:
    """Run the case of a number; the last one is also that of all other numbers."""
    builder = code.builder
    end = builder.append_basic_block("end")
    blocks = [builder.append_basic_block(f"case{i}") for i in range(len(cases))]
    switch = builder.switch(number, blocks[-1])
    for i, (block, case) in enumerate(zip(blocks, cases, strict=True)):
        if block is not blocks[-1]:
            switch.add_case(INT(i), block)
        builder.position_at_end(block)
        case()
        builder.branch(end)
    builder.position_at_end(end)


def widen(code: Code, term: Any, operation: Any, chunk: Any, into: Values) -> None:
    """The numbers of a chunk of a term of any kind, in fp32, written to variables."""

    def case(kind: int) -> Callable[[], None]:
        return lambda: write(code, into, widened(code, kind, term, chunk))

    kind = code.builder.and_(operation, INT(3))
    choose(code, kind, [case(number) for number in range(len(KINDS))])


def widened(
    code: Code, kind: int, term: Any, chunk: Any, source: Source | None = None
) -> list[Any]:
    """The numbers of a chunk of a term of a known kind, in fp32; ``source`` is its memory."""
    builder = code.builder
    if source is None:
        offset = builder.mul(chunk, INT(CHUNK * ITEM_BYTES[kind]))
        source = partial(load, code, builder.add(load(code, term, INT, 8), offset))
    if kind == KINDS["float32"]:
        return _floats(code, source)
    if kind == KINDS["int8"]:
        # Two chunks share a scale.
        block = builder.mul(builder.lshr(chunk, INT(1)), INT(4))
        scales = builder.add(load(code, term, INT, 24), block)
        scale = splat(builder, load(code, scales, FLOAT))
        return [builder.fmul(number, scale) for number in _small_numbers(code, source)]
    if kind == KINDS["bfloat16"]:
        return [builder.bitcast(half, FLOATS) for half in _halves(code, source, upper=True)]
    return [widened_fp16(builder, half) for half in _halves(code, source, upper=False)]


def kept(code: Code, mask: Any, chunk: Any) -> list[Any]:
    """Bits of a chunk of a mask: vectors of i1."""
    builder = code.builder
    at = builder.add(mask, builder.mul(chunk, INT(CHUNK // 8)))
    if not code.pairs:
        bits = [load(code, at, ir.IntType(LANES), LANES // 8 * v) for v in range(VECTORS)]
        return [builder.bitcast(part, _BITS) for part in bits]
    result = []
    for group in range(VECTORS // 2):
        word = splat(builder, load(code, at, ir.IntType(32), 4 * group))
        for odd in (0, 1):
            bits = ir.Constant(INTS, [1 << (2 * lane + odd) for lane in range(LANES)])
            result.append(builder.icmp_signed("!=", builder.and_(word, bits), int_constant(0)))
    return result


def where(code: Code, conditions: Values, values: Values, other: Any) -> list[Any]:
    """The values where a condition holds, else ``other``, a vector."""
    pairs = zip(conditions, values, strict=True)
    return [code.builder.select(condition, value, other) for condition, value in pairs]


def store(code: Code, values: Values, out: Any, kind: Any, chunk: Any) -> None:
    """Write a chunk of the result at ``out``, rounded once to its kind."""
    cases = [
        lambda: _store_floats(code, values, out, chunk),
        lambda: _store_halves(code, values, out, chunk, narrowed_bf16),
        lambda: _store_halves(code, values, out, chunk, narrowed_fp16),
    ]
    choose(code, kind, cases)


def _floats(code: Code, source: Source) -> list[Any]:
    loaded = [source(FLOATS, 4 * LANES * v) for v in range(VECTORS)]
    if not code.pairs:
        return loaded
    evens = ir.Constant(INTS, list(range(0, 2 * LANES, 2)))
    odds = ir.Constant(INTS, list(range(1, 2 * LANES, 2)))
    return [
        code.builder.shuffle_vector(loaded[v], loaded[v + 1], order)
        for v in range(0, VECTORS, 2)
        for order in (evens, odds)
    ]


def _halves(code: Code, source: Source, upper: bool) -> list[Any]:
    """16-bit numbers as the upper, or the lower, halves of 32 bits."""
    builder = code.builder
    sixteen = int_constant(16)
    if not code.pairs:
        halves = [source(HALVES, 2 * LANES * v) for v in range(VECTORS)]
        wide = [builder.zext(half, INTS) for half in halves]
        return [builder.shl(half, sixteen) for half in wide] if upper else wide
    result = []
    for group in range(VECTORS // 2):
        pair = source(INTS, 4 * LANES * group)
        even = builder.shl(pair, sixteen) if upper else builder.and_(pair, int_constant(0xFFFF))
        odd = builder.and_(pair, int_constant(0xFFFF0000)) if upper else builder.lshr(pair, sixteen)
        result += [even, odd]
    return result


def _small_numbers(code: Code, source: Source) -> list[Any]:
    """8-bit whole numbers as fp32."""
    builder = code.builder
    if code.pairs:
        wide = []
        for group in range(VECTORS // 2):
            pair = builder.sext(source(HALVES, 2 * LANES * group), INTS)
            even = builder.shl(pair, int_constant(24))
            wide += [builder.ashr(even, int_constant(24)), builder.ashr(pair, int_constant(8))]
    else:
        loaded = [source(_BYTES, LANES * v) for v in range(VECTORS)]
        wide = [builder.sext(part, INTS) for part in loaded]
    return [builder.sitofp(number, FLOATS) for number in wide]


def _put(code: Code, value: Any, out: Any, chunk: Any, size: int, vector: int) -> None:
    """One vector of a result whose numbers have ``size`` bytes, and no other alignment."""
    builder = code.builder
    start = builder.add(out, builder.mul(chunk, INT(CHUNK * size)))
    at = builder.add(start, INT(size * LANES * vector))
    builder.store(value, builder.inttoptr(at, value.type.as_pointer()), align=size)


def _store_floats(code: Code, values: Values, out: Any, chunk: Any) -> None:
    ordered = list(values)
    if code.pairs:
        orders = [
            ir.Constant(INTS, [half + i // 2 + LANES * (i % 2) for i in range(LANES)])
            for half in (0, LANES // 2)
        ]
        ordered = [
            code.builder.shuffle_vector(values[v], values[v + 1], order)
            for v in range(0, VECTORS, 2)
            for order in orders
        ]
    for v, value in enumerate(ordered):
        _put(code, value, out, chunk, 4, v)


def _store_halves(
    code: Code, values: Values, out: Any, chunk: Any, narrowed: Callable[[Any, Any], Any]
) -> None:
    """Narrowed numbers are the lower halves of 32 bits."""
    builder = code.builder
    bits = [narrowed(builder, value) for value in values]
    if not code.pairs:
        for v, value in enumerate(bits):
            _put(code, builder.trunc(value, HALVES), out, chunk, 2, v)
        return
    for v in range(0, VECTORS, 2):
        odd = builder.shl(bits[v + 1], int_constant(16))
        # Two 16-bit vectors' worth: the pair lies where its first half would.
        _put(code, builder.or_(bits[v], odd), out, chunk, 2, v)
