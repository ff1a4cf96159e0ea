"""Vectors of fp32 to and from 16 bits, by integer operations: exact on every processor.

``llvmlite`` code that other kernels put between their loads and stores; 32-bit lanes throughout.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

#: Numbers of a vector: 512 bits; LLVM splits them where a processor has shorter ones.
LANES = 16
INTS = ir.VectorType(ir.IntType(32), LANES)
FLOATS = ir.VectorType(ir.FloatType(), LANES)

#: fp32 exponents, in place, of the differences between the biases of fp16 and fp32.
_BIAS = 112 << 23
_SUBNORMAL = 113 << 23
#: fp32 bits of the least number that fp16 has no room for, of its least normal number, and of 1/2,
#: whose last bit is worth as much as that of a subnormal fp16 number.
_TOO_LARGE = 143 << 23
_LEAST_NORMAL = 113 << 23
_HALF = 126 << 23
_INFINITY = 255 << 23


def int_constant(value: int) -> Any:
    """All lanes the same 32 bits."""
    return ir.Constant(INTS, [value] * LANES)


def float_constant(value: float) -> Any:
    """All lanes the same number."""
    return ir.Constant(FLOATS, [value] * LANES)


def splat(builder: Any, value: Any) -> Any:
    """A scalar in every lane."""
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.IntType(32)(0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), order)


def widened_fp16(builder: Any, half: Any) -> Any:
    """fp32 numbers of fp16 bits in the lower halves, with subnormals, infinities and NaN."""
    magnitude = builder.and_(half, int_constant(0x7FFF))
    sign = builder.shl(builder.and_(half, int_constant(0x8000)), int_constant(16))
    shifted = builder.shl(magnitude, int_constant(13))
    normal = builder.add(shifted, int_constant(_BIAS))
    special = builder.or_(shifted, int_constant(_INFINITY))
    offset = builder.bitcast(int_constant(_SUBNORMAL), FLOATS)
    raised = builder.bitcast(builder.add(shifted, int_constant(_SUBNORMAL)), FLOATS)
    small = builder.bitcast(builder.fsub(raised, offset), INTS)
    is_special = builder.icmp_unsigned(">=", magnitude, int_constant(0x7C00))
    is_small = builder.icmp_unsigned("<", magnitude, int_constant(0x0400))
    bits = builder.select(is_special, special, normal)
    bits = builder.select(is_small, small, bits)
    return builder.bitcast(builder.or_(bits, sign), FLOATS)


def narrowed_bf16(builder: Any, value: Any) -> Any:
    """bf16 bits in the lower halves: to nearest, ties to even; NaN is 0x7FC0."""
    bits = builder.bitcast(value, INTS)
    odd = builder.and_(builder.lshr(bits, int_constant(16)), int_constant(1))
    rounded = builder.add(builder.add(bits, int_constant(0x7FFF)), odd)
    nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(nan, int_constant(0x7FC0 << 16), rounded)
    return builder.lshr(rounded, int_constant(16))


def narrowed_fp16(builder: Any, value: Any) -> Any:
    """fp16 bits in the lower halves: to nearest, ties to even; NaN is 0x7E00."""
    bits = builder.bitcast(value, INTS)
    magnitude = builder.and_(bits, int_constant(0x7FFFFFFF))
    sign = builder.lshr(builder.and_(bits, int_constant(0x80000000)), int_constant(16))
    odd = builder.and_(builder.lshr(magnitude, int_constant(13)), int_constant(1))
    rounded = builder.add(builder.sub(magnitude, int_constant(_BIAS)), int_constant(0xFFF))
    normal = builder.lshr(builder.add(rounded, odd), int_constant(13))
    # Added to 1/2, a small number is rounded to multiples of 2^-24 by the addition itself.
    half = builder.bitcast(int_constant(_HALF), FLOATS)
    sum_ = builder.bitcast(builder.fadd(builder.bitcast(magnitude, FLOATS), half), INTS)
    small = builder.sub(sum_, int_constant(_HALF))
    is_small = builder.icmp_unsigned("<", magnitude, int_constant(_LEAST_NORMAL))
    is_large = builder.icmp_unsigned(">=", magnitude, int_constant(_TOO_LARGE))
    result = builder.select(is_small, small, normal)
    result = builder.or_(builder.select(is_large, int_constant(0x7C00), result), sign)
    nan = builder.icmp_unsigned(">", magnitude, int_constant(_INFINITY))
    return builder.select(nan, int_constant(0x7E00), result)
