"""Packed numbers of a chunk spread to where its elements are: in registers, or in memory.

Processors with AVX-512 VBMI2 expand a vector of 16-bit numbers in one instruction; the common rows
then never leave the registers. Elsewhere a loop over the bits of the mask writes one number after
the other to memory of the chunk's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features

from mergesearch.merging.kernels.chunks.columns import (
    CHUNK,
    FIELDS,
    HALVES,
    INT,
    ITEM_BYTES,
    KINDS,
    PACKED,
    Code,
    Source,
    keep,
    load,
)
from mergesearch.merging.kernels.chunks.narrow import INTS, LANES

#: Bytes of a chunk of the widest numbers.
_BYTES = 4 * CHUNK
_FALSE = ir.Constant(ir.IntType(1), 0)


@dataclass(frozen=True)
class SpreadRoom:
    """Memory of one chunk of one term.

    Attributes:
        term: Address of the term that reads the spread numbers, int64 ``(FIELDS,)``.
        numbers: Address of these, as many bytes as the widest take.
    """

    term: Any
    numbers: Any


def spread_room(code: Code) -> SpreadRoom:
    """Memory on the stack, as int64 addresses."""
    builder = code.builder
    kinds = (ir.ArrayType(INT, FIELDS), ir.ArrayType(ir.IntType(8), _BYTES))
    term, numbers = (cgutils.alloca_once(builder, kind) for kind in kinds)
    numbers.align = 64
    return SpreadRoom(builder.ptrtoint(term, INT), builder.ptrtoint(numbers, INT))


def spread(code: Code, term: Any, chunk: Any, room: SpreadRoom) -> None:
    """Put the kept numbers of a chunk in their places, zeros between them."""
    builder = code.builder
    operation = load(code, term, INT)
    kind = builder.and_(operation, INT(3))
    wide = builder.icmp_signed("==", kind, INT(KINDS["float32"]))
    with builder.if_else(wide) as (then, otherwise):
        with then:
            _spread(code, term, chunk, room.numbers, ITEM_BYTES[KINDS["float32"]])
        with otherwise:
            _spread(code, term, chunk, room.numbers, ITEM_BYTES[KINDS["bfloat16"]])
    size = builder.select(wide, INT(4 * CHUNK), INT(2 * CHUNK))
    first = builder.sub(room.numbers, builder.mul(chunk, size))
    keep(code, room.term, builder.and_(operation, INT(~PACKED)))
    keep(code, room.term, first, 8)
    keep(code, room.term, load(code, term, INT, 16), 16)


def _spread(code: Code, term: Any, chunk: Any, numbers: Any, size: int) -> None:
    bits, source = _packed(code, term, chunk, size)
    if not expands():
        _scatter(code, bits, source, numbers, size)
        return
    for part, vector in enumerate(_vectors(code, bits, source, size)):
        keep(code, numbers, vector, 64 * part)


def _packed(code: Code, term: Any, chunk: Any, size: int) -> tuple[Any, Any]:
    """The mask of a chunk, an int64, and the address of its first number."""
    builder = code.builder
    starts = builder.add(load(code, term, INT, 32), builder.mul(chunk, INT(4)))
    start = builder.zext(load(code, starts, ir.IntType(32)), INT)
    source = builder.add(load(code, term, INT, 8), builder.mul(start, INT(size)))
    mask = builder.add(load(code, term, INT, 16), builder.mul(chunk, INT(CHUNK // 8)))
    return load(code, mask, INT), source


def expanded(code: Code, kind: int, term: Any, chunk: Any) -> Source:
    """The memory of a chunk as if its packed numbers were spread, in registers."""
    builder = code.builder
    size = ITEM_BYTES[kind]
    vectors = list(_vectors(code, *_packed(code, term, chunk, size), size))

    def source(wanted: Any, offset: int) -> Any:
        vector = vectors[offset // 64]
        if wanted != HALVES:
            return builder.bitcast(vector, wanted)
        first = offset % 64 // size
        order = ir.Constant(INTS, list(range(first, first + LANES)))
        return builder.shuffle_vector(vector, ir.Constant(vector.type, None), order)

    return source


@cache
def expands() -> bool:
    """Whether numba compiles for processors that spread 16-bit numbers by one instruction."""
    features = config.CPU_FEATURES
    given = get_host_cpu_features() if features is None else features
    return "+avx512vbmi2" in given.split(",")


def _vectors(code: Code, bits: Any, source: Any, size: int) -> Iterator[Any]:
    """The next numbers where bits are 1 and zeros elsewhere, a vector of 64 bytes at a time.

    Nothing beyond the last of them is read.
    """
    builder = code.builder
    lanes = 64 // size
    kind = ir.VectorType(ir.IntType(8 * size), lanes)
    mask_kind = ir.VectorType(ir.IntType(1), lanes)
    expand = builder.module.declare_intrinsic(
        f"llvm.masked.expandload.v{lanes}i{8 * size}",
        fnty=ir.FunctionType(kind, [ir.PointerType(), mask_kind, kind]),
    )
    for part in range(CHUNK // lanes):
        own = builder.trunc(builder.lshr(bits, INT(lanes * part)), ir.IntType(lanes))
        at = builder.inttoptr(source, ir.PointerType())
        mask = builder.bitcast(own, mask_kind)
        yield builder.call(expand, (at, mask, ir.Constant(kind, None)))
        count = builder.zext(builder.ctpop(own), INT)
        source = builder.add(source, builder.mul(count, INT(size)))


def _scatter(code: Code, bits: Any, source: Any, numbers: Any, size: int) -> None:
    """The next number for every bit that is 1, the lowest first, on any processor."""
    builder = code.builder
    zeros = ir.Constant(ir.VectorType(INT, 8), None)
    for part in range(CHUNK * size // 64):
        keep(code, numbers, zeros, 64 * part)
    number = ir.IntType(8 * size)
    before = builder.block
    loop = builder.append_basic_block("scatter")
    end = builder.append_basic_block("scattered")
    builder.cbranch(builder.icmp_signed("!=", bits, INT(0)), loop, end)
    builder.position_at_end(loop)
    left = builder.phi(INT)
    at = builder.phi(INT)
    place = builder.mul(builder.cttz(left, _FALSE), INT(size))
    keep(code, builder.add(numbers, place), load(code, at, number))
    rest = builder.and_(left, builder.sub(left, INT(1)))
    following = builder.add(at, INT(size))
    for phi, first, then in ((left, bits, rest), (at, source, following)):
        phi.add_incoming(first, before)
        phi.add_incoming(then, loop)
    builder.cbranch(builder.icmp_signed("!=", rest, INT(0)), loop, end)
    builder.position_at_end(end)
