"""A chunk of base and experts as stored, thinned, elected and summed without leaving registers.

Thinning is what TIES and DARE do to a task vector: elements are dropped by chance, the survivors
multiplied, and those below a magnitude dropped. The thinned terms of the chunk wait in the
first-level cache until the sign of their sum is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from mergesearch.merging.kernels.chunks.columns import (
    CHUNK,
    FLOAT,
    HALVES,
    INT,
    VECTORS,
    Code,
    Values,
    choose,
    keep,
    load,
    read,
    variables,
    where,
    widened,
    write,
)
from mergesearch.merging.kernels.chunks.electing import add_elected, elect
from mergesearch.merging.kernels.chunks.narrow import (
    FLOATS,
    INTS,
    LANES,
    float_constant,
    int_constant,
    narrowed_bf16,
    splat,
)
from mergesearch.merging.kernels.chunks.philox import random_bits
from mergesearch.merging.kernels.chunks.rows import sums
from mergesearch.merging.kernels.chunks.terms import (
    BASE_AT,
    CHANCE,
    CHANGE_AT,
    DRAWN,
    FACTOR,
    IS_CHANGE,
    KEY,
    KIND,
    LIMIT,
    LOST_AT,
    MAGNITUDE,
    ODD_AT,
    OTHER_KEY,
    SUM_ALL,
    Thinned,
    magnitude,
    terms_of,
    weighted_terms,
)


@intrinsic  # type: ignore[untyped-decorator]
def thin_chunk(
    _typing: Any,
    _terms: Any,
    _weights: Any,
    _count: Any,
    _chunk: Any,
    _counter: Any,
    _rule: Any,
    _majority: Any,
    _out: Any,
    _kind: Any,
    _room: Any,
    _votes: Any,
) -> Any:
    """Merge a chunk; see :class:`Thinned` for the arguments."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _emit(Code(builder, pairs=False), Thinned(*arguments))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), generate


def _emit(code: Code, call: Thinned) -> None:
    builder = code.builder
    base = variables(code)
    signs = variables(code)
    totals = variables(code)
    sizes = variables(code)
    _widen(code, call.terms, call.chunk, base)
    for v, value in enumerate(read(code, base)):
        keep(code, call.room, value, 4 * (BASE_AT + LANES * v))
    write(code, totals, [float_constant(0.0)] * VECTORS)
    write(code, sizes, [float_constant(0.0)] * VECTORS)
    with terms_of(code, call) as (term, _weight, place):
        _take_term(code, call, term, place, base, (totals, sizes))
    elects = builder.icmp_signed("!=", call.rule, INT(SUM_ALL))
    with builder.if_then(elects):
        elect(code, call, totals, sizes, signs)
    with builder.if_then(builder.icmp_signed("!=", call.out, INT(0))):
        merged = variables(code)
        write(code, merged, read(code, base))
        with builder.if_else(elects) as (then, otherwise):
            with then:
                add_elected(code, call, signs, merged)
            with otherwise:
                _add_all(code, call, merged)
        _store(code, call, read(code, base), read(code, merged))


def _widen(code: Code, term: Any, chunk: Any, into: Values) -> None:
    """The fp32 or bf16 numbers of a chunk of a term, written to variables in fp32."""
    kind = load(code, term, INT, 8 * KIND)
    cases = [
        lambda number=number: write(code, into, widened(code, number, term, chunk))
        for number in (0, 1)
    ]
    choose(code, kind, cases)


def _take_term(
    code: Code, call: Thinned, term: Any, place: Any, base: Values, held: tuple[Values, Values]
) -> None:
    """Thin a task vector, keep it in the room, and add it to the sums."""
    builder = code.builder
    totals, sizes_held = held
    values = variables(code)
    _widen(code, term, call.chunk, values)
    is_expert = builder.icmp_signed("==", load(code, term, INT, 8 * IS_CHANGE), INT(0))
    with builder.if_then(is_expert):
        pairs = zip(read(code, values), read(code, base), strict=True)
        write(code, values, [builder.fsub(value, origin) for value, origin in pairs])
    _remember_odd(code, call, read(code, values))
    drawn = builder.icmp_signed("!=", load(code, term, INT, 8 * DRAWN), INT(0))
    with builder.if_then(drawn):
        _drop(code, call, term, values)
    limit = splat(builder, load(code, term, FLOAT, 8 * LIMIT))
    sizes = [magnitude(code, value) for value in read(code, values)]
    large = [builder.fcmp_ordered(">=", size, limit) for size in sizes]
    kept = where(code, large, read(code, values), float_constant(0.0))
    for v, value in enumerate(kept):
        keep(code, place, value, 4 * LANES * v)
    write(code, totals, sums(code, read(code, totals), kept))
    shown = where(code, large, sizes, float_constant(0.0))
    write(code, sizes_held, sums(code, read(code, sizes_held), shown))


def _drop(code: Code, call: Thinned, term: Any, values: Values) -> None:
    """Drop elements by chance and multiply the others."""
    builder = code.builder
    keys = (load(code, term, INT, 8 * KEY), load(code, term, INT, 8 * OTHER_KEY))
    chance = splat(builder, load(code, term, ir.IntType(32), 8 * CHANCE))
    factor = splat(builder, load(code, term, FLOAT, 8 * FACTOR))
    bits = random_bits(builder, keys, call.counter)
    survives = [builder.icmp_unsigned("<", part, chance) for part in bits]
    left = where(code, survives, read(code, values), float_constant(0.0))
    write(code, values, [builder.fmul(value, factor) for value in left])


def _remember_odd(code: Code, call: Thinned, changes: Values) -> None:
    """Keep the largest bits of any change, which tell whether one is not finite."""
    builder = code.builder
    largest = load(code, call.room, INTS, 4 * ODD_AT)
    for change in changes:
        bits = builder.and_(builder.bitcast(change, INTS), int_constant(MAGNITUDE))
        more = builder.icmp_unsigned(">", bits, largest)
        largest = builder.select(more, bits, largest)
    keep(code, call.room, largest, 4 * ODD_AT)


def _add_all(code: Code, call: Thinned, merged: Values) -> None:
    """Add ``weight · term`` of all terms."""
    with weighted_terms(code, call) as (weight, place):
        terms = (load(code, place, FLOATS, 4 * LANES * v) for v in range(VECTORS))
        products = [code.builder.fmul(weight, term) for term in terms]
        write(code, merged, sums(code, read(code, merged), products))


def _store(code: Code, call: Thinned, base: Sequence[Any], merged: Sequence[Any]) -> None:
    """Write the result; of bf16 also sum up what rounding lost and what the merge changed."""
    builder = code.builder
    is_wide = builder.icmp_signed("==", call.kind, INT(0))
    with builder.if_else(is_wide) as (then, otherwise):
        with then:
            at = builder.add(call.out, builder.mul(call.chunk, INT(4 * CHUNK)))
            for v, value in enumerate(merged):
                keep(code, at, value, 4 * LANES * v)
        with otherwise:
            at = builder.add(call.out, builder.mul(call.chunk, INT(2 * CHUNK)))
            for v, value in enumerate(merged):
                bits = narrowed_bf16(builder, value)
                keep(code, at, builder.trunc(bits, HALVES), 2 * LANES * v)
                stored = builder.bitcast(builder.shl(bits, int_constant(16)), FLOATS)
                _add_square(code, call, LOST_AT, builder.fsub(stored, value))
                _add_square(code, call, CHANGE_AT, builder.fsub(value, base[v]))


def _add_square(code: Code, call: Thinned, place: int, value: Any) -> None:
    held = load(code, call.room, FLOATS, 4 * place)
    more = code.builder.fadd(held, code.builder.fmul(value, value))
    keep(code, call.room, more, 4 * place)
