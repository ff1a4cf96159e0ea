"""Columns of spans decoded in registers, by Triton: what its kernels share.

A program works on a block of ``(ROWS, 8)`` elements of a span: the eight elements of a row share
one byte of a mask, and are one load of 128 bits in bf16. The operations and their order are those
that :mod:`mergesearch.merging.kernels.spans` states.

Three things keep the bits. bf16 is widened and rounded in integers, as Triton's interpreter rounds
it towards zero. Divisions are ``div_rn``, since ``/`` of fp32 is an approximation on a GPU. Every
launch passes :data:`OPTIONS`, without which a product and a sum become one fused operation.

Triton decides when a kernel is defined whether its interpreter runs it (``TRITON_INTERPRET=1``), so
the variable has to be set before this module is imported.
"""

# ruff: noqa: RUF005 (Triton's compiler joins tuples, it does not unpack them)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from mergesearch.merging.errors import InputError
from mergesearch.merging.kernels.triton_blocks import (
    CODES_OF_DTYPES,
    MASKED,
    MINUS_BASE,
    OFFSETS,
    PACKED,
    SCALED,
)

#: Threads of a program, 32 each, and no fused multiplication and addition.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

#: dtypes of results and vectors, and how their numbers are stored.
STORED = {
    torch.float32: CODES_OF_DTYPES["float32"],
    torch.bfloat16: CODES_OF_DTYPES["bfloat16"],
    torch.float16: CODES_OF_DTYPES["float16"],
}

_DTYPE = tl.constexpr(3)
_FP32 = tl.constexpr(CODES_OF_DTYPES["float32"])
_BF16 = tl.constexpr(CODES_OF_DTYPES["bfloat16"])
_FP16 = tl.constexpr(CODES_OF_DTYPES["float16"])
_INT8 = tl.constexpr(CODES_OF_DTYPES["int8"])
_MINUS_BASE = tl.constexpr(MINUS_BASE)
_SCALED = tl.constexpr(SCALED)
_MASKED = tl.constexpr(MASKED)
_PACKED = tl.constexpr(PACKED)
_OFFSETS = tl.constexpr(OFFSETS)


def check_arrays(memory: torch.Tensor, array: torch.Tensor, size: int) -> None:
    """Check that kernels can read an arena and write, or read, a flat array of ``size`` elements.

    Raises:
        InputError: If they cannot.
    """
    if memory.dtype != torch.uint8 or not memory.is_contiguous() or memory.data_ptr() % 4:
        raise InputError(
            "triton: expected a contiguous arena of uint8 at a multiple of 4 bytes, received "
            f"{memory.dtype} at {memory.data_ptr()}"
        )
    if array.dtype not in STORED or array.device != memory.device:
        raise InputError(
            f"triton: expected fp32, bf16 or fp16 on {memory.device}, received {array.dtype} on "
            f"{array.device}; use kernel='torch'"
        )
    if tuple(array.shape) != (size,) or not array.is_contiguous():
        raise InputError(
            f"triton: expected a contiguous array of shape {(size,)}, received {tuple(array.shape)}"
        )


@triton.jit  # type: ignore[untyped-decorator]
def is_used(weight: tl.tensor) -> tl.tensor:
    """Whether a weight, a scalar, is not 0; NaN is not.

    By way of an integer: the interpreter takes the result of a comparison of fp32 for fp32 where it
    is spread over a block.
    """
    return tl.where(weight != 0, 1, 0) != 0


@triton.jit  # type: ignore[untyped-decorator]
def widened(first: tl.tensor, at: tl.tensor, wanted: tl.tensor, code: tl.tensor) -> tl.tensor:
    """Numbers in fp32, bf16 or fp16 that begin at a byte, in fp32; 0 where not ``wanted``."""
    x = tl.zeros(at.shape, tl.float32)
    if (_DTYPE & code) == _FP32:
        place = first.to(tl.pointer_type(tl.float32)) + at
        x = tl.load(place, mask=wanted, other=0.0, eviction_policy="evict_first")
    if (_DTYPE & code) == _BF16:
        place = first.to(tl.pointer_type(tl.uint16)) + at
        bits = tl.load(place, mask=wanted, other=0, eviction_policy="evict_first")
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    if (_DTYPE & code) == _FP16:
        place = first.to(tl.pointer_type(tl.float16)) + at
        x = tl.load(place, mask=wanted, other=0.0, eviction_policy="evict_first").to(tl.float32)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def numbers(
    memory: tl.tensor,
    column: tl.tensor,
    place: tl.tensor,
    used: tl.tensor,
    code: tl.tensor,
    bits: tl.tensor,
    below: tl.tensor,
    aligned: tl.constexpr,
) -> tl.tensor:
    """The stored numbers of a block in fp32, ``(ROWS, 8)``; 0 where they are not loaded.

    Args:
        memory: The arena.
        column: Where its offsets stand.
        place: Elements of the span ``(ROWS, 8)``, the first of every row ``(ROWS, 1)``, their
            numbers within a row ``(1, 8)``, and which elements ``(ROWS, 8)`` and rows ``(ROWS, 1)``
            belong to the piece.
        used: Whether to load at all.
        code: How the column is stored.
        bits: Which elements of every row are kept, ``(ROWS, 1)``; of packed numbers others are not
            stored.
        below: Of packed numbers, how many kept elements of its 64 lie before every row.
        aligned: Whether the numbers start at a multiple of 16 bytes.
    """
    at, rows, lanes, inside, in_row = place
    offset = tl.load(column)
    if aligned:
        offset = tl.multiple_of(offset, 16)
    wanted = inside & used
    if (_PACKED & code) != 0:
        starts = (memory + tl.load(column + 3)).to(tl.pointer_type(tl.int32))
        first = tl.load(starts + rows // 64, mask=in_row & used, other=0)
        kept = wanted & (((bits >> lanes) & 1) != 0)
        x = widened(memory + offset, first + below + kept_before(bits, lanes), kept, code)
    else:
        x = widened(memory + offset, at, wanted, code)
    if (_DTYPE & code) == _INT8:
        small = (memory + offset).to(tl.pointer_type(tl.int8)) + at
        x = tl.load(small, mask=wanted, other=0, eviction_policy="evict_first").to(tl.float32)
        scales = (memory + tl.load(column + 2)).to(tl.pointer_type(tl.float32))
        x = x * tl.load(scales + rows // 128, mask=in_row & used, other=0.0)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def kept_before(bits: tl.tensor, lanes: tl.tensor) -> tl.tensor:
    """How many of the eight bits of every row lie before each of them, ``(ROWS, 8)``.

    Every bit is moved to four of its own, in which the product adds up those below: at most seven.
    """
    spread = (bits | (bits << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    return ((spread * 0x11111110) >> (4 * lanes)) & 0xF


@triton.jit  # type: ignore[untyped-decorator]
def mask_bits(
    memory: tl.tensor, column: tl.tensor, place: tl.tensor, used: tl.tensor, code: tl.tensor
) -> tl.tensor:
    """The byte of every row that says which of its elements are kept, int32 ``(ROWS, 1)``.

    And, of packed numbers, how many kept elements of its 64 lie before the row.
    """
    _at, rows, _lanes, _inside, in_row = place
    bits = tl.full(rows.shape, 255, tl.int32)
    below = tl.zeros(rows.shape, tl.int32)
    if (_MASKED & code) != 0:
        mask = memory + tl.load(column + 1)
        if (_PACKED & code) != 0:
            words = mask.to(tl.pointer_type(tl.uint32)) + rows // 64 * 2
            low = tl.load(words, mask=in_row & used, other=0)
            high = tl.load(words + 1, mask=in_row & used, other=0)
            byte = rows // 8 % 8
            shift = byte % 4 * 8
            under = (tl.full(rows.shape, 1, tl.uint32) << shift.to(tl.uint32)) - 1
            upper = byte >= 4
            bits = (tl.where(upper, high, low) >> shift.to(tl.uint32)).to(tl.int32) & 255
            below = ones_of(tl.where(upper, low, low & under), tl.where(upper, high & under, 0))
        else:
            bits = tl.load(mask + rows // 8, mask=in_row & used, other=0).to(tl.int32)
    return bits, below


@triton.jit  # type: ignore[untyped-decorator]
def ones_of(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """How many bits of two words of 32 are 1, int32."""
    low = low - ((low >> 1) & 0x55555555)
    high = high - ((high >> 1) & 0x55555555)
    fours = (low & 0x33333333) + ((low >> 2) & 0x33333333)
    fours += (high & 0x33333333) + ((high >> 2) & 0x33333333)
    eights = (fours & 0x0F0F0F0F) + ((fours >> 4) & 0x0F0F0F0F)
    return ((eights * 0x01010101) >> 24).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def decoded(
    memory: tl.tensor,
    tables: tl.tensor,
    place: tl.tensor,
    used: tl.tensor,
    CODES: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TERMS: tl.constexpr,
) -> tl.tensor:
    """Base and rows of a block as decoded: as many tensors ``(ROWS, 8)`` as there are terms.

    Args:
        memory: The arena.
        tables: Columns, scales and flags of the span.
        place: As for :func:`numbers`.
        used: Which terms are wanted; nothing is loaded for others, and their numbers mean nothing.
        CODES: How terms are stored; empty where a table says so.
        SHARED: Whether rows are divided by the number of rows that keep the position.
        ALIGNED: Whether numbers start at multiples of 16 bytes.
        TERMS: Number of terms.
    """
    columns, scales, flags = tables
    if len(CODES) > 0:
        codes: tl.constexpr = CODES
        shared: tl.constexpr = SHARED
    else:
        codes = ()
        shared = tl.load(flags + TERMS) != 0
        for t in tl.static_range(TERMS):
            codes = codes + (tl.load(flags + t),)
    any_row = False
    reads_base = used[0]
    for t in tl.static_range(1, TERMS):
        any_row = any_row | used[t]
        reads_base = reads_base | (used[t] & ((_MINUS_BASE & codes[t]) != 0))
    bits: tl.tuple = (0,)
    below: tl.tuple = (0,)
    count = tl.zeros(place[0].shape, tl.float32)
    for t in tl.static_range(1, TERMS):
        counted = used[t] | (any_row & shared)
        own, before = mask_bits(memory, columns + _OFFSETS * t, place, counted, codes[t])
        bits = bits + (own,)
        below = below + (before,)
        count += ((own >> place[2]) & 1).to(tl.float32)
    count = tl.where(shared, tl.maximum(count, 1.0), 1.0)
    base = numbers(memory, columns, place, reads_base, codes[0], 0, 0, ALIGNED)
    result: tl.tuple = (base,)
    for t in tl.static_range(1, TERMS):
        column = columns + _OFFSETS * t
        x = numbers(memory, column, place, used[t], codes[t], bits[t], below[t], ALIGNED)
        if (_MINUS_BASE & codes[t]) != 0:
            x = x - base
        if (_SCALED & codes[t]) != 0:
            x = x * tl.load(scales + t)
        if (_MASKED & codes[t]) != 0:
            x = tl.where(((bits[t] >> place[2]) & 1) != 0, x, 0.0)
        if SHARED or len(CODES) == 0:
            x = tl.div_rn(x, count)
        result = result + (x,)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def narrowed(total: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """The sum rounded once to the dtype of the result: fp32, or the bits of 16 in int16.

    To nearest, ties to even; every NaN of 16 bits becomes the canonical one.
    """
    if kind == _BF16:
        bits = total.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(total == total, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.int16, bitcast=True)
    elif kind == _FP16:  # noqa: RET505 (a branch that is not taken must not be compiled)
        half = total.to(tl.float16).to(tl.int16, bitcast=True)
        return tl.where(total == total, half, 0x7E00).to(tl.int16)
    else:
        return total
