"""Philox in vector registers: the random bits of a chunk of elements, eight counters at a time.

Philox 4x64 with 10 rounds (Salmon 2011, "Parallel random numbers: as easy as 1, 2, 3", section
3.2), to the bit as numpy's generator of that name gives it. A counter gives four words of 64 bits,
the bits of eight elements; so a chunk of 64 elements takes the eight counters that a vector holds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from mergesearch.merging.kernels.chunks.columns import CHUNK, VECTORS
from mergesearch.merging.kernels.chunks.narrow import INTS

#: Counters of a chunk: each gives the bits of eight elements.
COUNTERS = CHUNK // 8

_WORD = ir.IntType(64)
_WORDS = ir.VectorType(_WORD, COUNTERS)
_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
#: What a key grows by from round to round.
_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOWER = 0xFFFFFFFF


def random_bits(builder: Any, keys: tuple[Any, Any], first: Any) -> list[Any]:
    """The bits of a chunk, one vector of 32-bit integers for each quarter of it.

    Args:
        builder: Where instructions go.
        keys: The two words of the key, int64.
        first: Counter of the chunk's first eight elements, as numpy is given it, int64.
    """
    # numpy counts up before it draws.
    ahead = ir.Constant(_WORDS, [_WORD(lane + 1) for lane in range(COUNTERS)])
    zero = _constant(0)
    words = [builder.add(_splat(builder, first), ahead), zero, zero, zero]
    round_keys = [_splat(builder, key) for key in keys]
    for _ in range(_ROUNDS):
        words = _round(builder, words, round_keys)
        pairs = zip(round_keys, _STEPS, strict=True)
        round_keys = [builder.add(key, _constant(step)) for key, step in pairs]
    return _in_order(builder, words)


def _round(builder: Any, words: list[Any], keys: list[Any]) -> list[Any]:
    upper0, lower0 = _product(builder, _MULTIPLIERS[0], words[0])
    upper1, lower1 = _product(builder, _MULTIPLIERS[1], words[2])
    return [
        builder.xor(builder.xor(upper1, words[1]), keys[0]),
        lower1,
        builder.xor(builder.xor(upper0, words[3]), keys[1]),
        lower0,
    ]


def _product(builder: Any, factor: int, words: Any) -> tuple[Any, Any]:
    """Upper and lower 64 bits of a product, from products of 32 bits, which vectors have."""
    lower = _constant(_LOWER)
    half = _constant(32)
    word_low = builder.and_(words, lower)
    word_high = builder.lshr(words, half)
    factor_low = _constant(factor & _LOWER)
    factor_high = _constant(factor >> 32)
    lowest = builder.mul(factor_low, word_low)
    middle = builder.add(builder.mul(factor_high, word_low), builder.lshr(lowest, half))
    other = builder.add(builder.mul(factor_low, word_high), builder.and_(middle, lower))
    highest = builder.add(builder.mul(factor_high, word_high), builder.lshr(middle, half))
    upper = builder.add(highest, builder.lshr(other, half))
    return upper, builder.or_(builder.shl(other, half), builder.and_(lowest, lower))


def _in_order(builder: Any, words: list[Any]) -> list[Any]:
    """The four words of every counter one after the other, as 32-bit halves, lower ones first."""
    vectors = []
    for group in range(VECTORS):
        first = group * COUNTERS // VECTORS
        # (word 0 and 1 of two counters), (word 2 and 3 of them), then both together
        lanes = [lane for counter in (first, first + 1) for lane in (counter, COUNTERS + counter)]
        front = _shuffled(builder, words[0], words[1], lanes)
        back = _shuffled(builder, words[2], words[3], lanes)
        together = _shuffled(builder, front, back, [0, 1, 4, 5, 2, 3, 6, 7])
        vectors.append(builder.bitcast(together, INTS))
    return vectors


def _shuffled(builder: Any, one: Any, other: Any, lanes: list[int]) -> Any:
    order = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(one, other, order)


def _constant(value: int) -> Any:
    return ir.Constant(_WORDS, [_WORD(value)] * COUNTERS)


def _splat(builder: Any, value: Any) -> Any:
    empty = ir.Constant(_WORDS, ir.Undefined)
    one = builder.insert_element(empty, value, ir.IntType(32)(0))
    return _shuffled(builder, one, empty, [0] * COUNTERS)
