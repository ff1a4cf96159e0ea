"""Sums and elections of stored columns in registers, chunk by chunk: vector code for numba.

numba's own loops do not reach it: a column's form is known only when a merge runs, and a pass over
scratch memory for every form costs more than the memory bandwidth leaves. Here a loop over the
terms stands inside a loop over chunks of 64 elements, whose sums never leave the registers. The
form of a term is a branch, which the processor predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mergesearch.merging.kernels.chunks.columns import (
    CHUNK,
    FLOAT,
    INT,
    VECTORS,
    Code,
    Values,
    keep,
    load,
    read,
    store,
    variables,
    where,
    write,
)
from mergesearch.merging.kernels.chunks.narrow import FLOATS, LANES, float_constant, splat
from mergesearch.merging.kernels.chunks.rows import (
    UNREAD,
    Call,
    make_room,
    open_chunk,
    rows_of,
    sums,
    with_row,
)

#: Rules of a sum that is made in parts, as bits: it begins with what waits in scratch memory, and
#: waits there for more rows.
GOES_ON = 1
WAITS = 2

#: Rules of an election, as numbers.
_MEAN = 2
_WEIGHTED = 3
_MAX = 4


def _compiled(pairs: bool, emit: Callable[[Code, Call], None]) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def chunks(
        _typing: Any,
        _terms: Any,
        _scalars: Any,
        _count: Any,
        _masks: Any,
        _mask_count: Any,
        _first: Any,
        _last: Any,
        _out: Any,
        _kind: Any,
        _rule: Any,
        _scratch: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            emit(Code(builder, pairs), Call(*arguments))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return chunks


def _emit_sum(code: Code, call: Call) -> None:
    """``Σ_t weight[t] · row[t]``, the base first; 0 where there is no term.

    A sum in parts waits in scratch memory as it stands in the registers, ``(chunks, CHUNK)``, fp32.
    """
    builder = code.builder
    room = make_room(code)
    totals = variables(code)
    reads = builder.icmp_signed("!=", load(code, call.terms, INT), INT(UNREAD))
    weight = load(code, call.scalars, FLOAT)
    weighs = builder.and_(reads, builder.fcmp_unordered("!=", weight, FLOAT(0.0)))
    # Adding to −0 leaves every number as it is, −0 too.
    none = builder.icmp_signed("==", call.count, INT(0))
    empty = splat(builder, builder.select(none, FLOAT(0.0), FLOAT(-0.0)))
    goes_on = _has_rule(code, call, GOES_ON)
    waits = _has_rule(code, call, WAITS)
    with cgutils.for_range(builder, call.last, start=call.first) as chunks:
        open_chunk(code, call, chunks.index, room, reads)
        offset = builder.mul(builder.sub(chunks.index, call.first), INT(4 * CHUNK))
        waiting = builder.add(call.scratch, offset)
        with builder.if_else(goes_on) as (then, otherwise):
            with then:
                _take_up(code, waiting, totals)
            with otherwise, builder.if_else(weighs) as (weighed, left_out):
                with weighed:
                    wide = splat(builder, weight)
                    terms = [builder.fmul(wide, base) for base in read(code, room.base)]
                    write(code, totals, terms)
                with left_out:
                    write(code, totals, [empty] * VECTORS)
        with rows_of(code, call) as (term, scalars, _room_of_term):
            with_row(code, term, scalars, chunks.index, room, partial(_add, code, scalars, totals))
        with builder.if_else(waits) as (then, otherwise):
            with then:
                _put_by(code, waiting, totals)
            with otherwise:
                store(code, read(code, totals), call.out, call.kind, chunks.index)


def _has_rule(code: Code, call: Call, bit: int) -> Any:
    return code.builder.icmp_signed("!=", code.builder.and_(call.rule, INT(bit)), INT(0))


def _take_up(code: Code, waiting: Any, totals: Values) -> None:
    parts = [load(code, waiting, FLOATS, 4 * LANES * v) for v in range(VECTORS)]
    write(code, totals, parts)


def _put_by(code: Code, waiting: Any, totals: Values) -> None:
    for v, total in enumerate(read(code, totals)):
        keep(code, waiting, total, 4 * LANES * v)


def _emit_election(code: Code, call: Call) -> None:
    """The base plus what its rows elect: the sign of their sum, and the terms that agree with it.

    The terms wait in the first-level cache until their sum is known.
    """
    builder = code.builder
    room = make_room(code)
    signs = variables(code)
    totals = variables(code)
    counts = variables(code)
    with cgutils.for_range(builder, call.last, start=call.first) as chunks:
        open_chunk(code, call, chunks.index, room, None)
        write(code, totals, [float_constant(-0.0)] * VECTORS)
        with rows_of(code, call) as (term, scalars, room_of_term):
            use = partial(_add_and_keep, code, scalars, totals, room_of_term)
            with_row(code, term, scalars, chunks.index, room, use)
        write(code, signs, [_sign(code, total) for total in read(code, totals)])
        write(code, totals, [float_constant(0.0)] * VECTORS)
        write(code, counts, [float_constant(0.0)] * VECTORS)
        with rows_of(code, call) as (_term, scalars, room_of_term):
            weight = load(code, scalars, FLOAT)
            terms = [load(code, room_of_term, FLOATS, 4 * LANES * v) for v in range(VECTORS)]
            _vote(code, call.rule, weight, terms, signs, totals, counts)
        # A base alone stays as it is: −0 + 0 would be 0.
        alone = builder.icmp_signed("==", call.count, INT(0))
        with builder.if_else(alone) as (then, otherwise):
            with then:
                write(code, totals, read(code, room.base))
            with otherwise:
                _finish(code, call.rule, room.base, signs, totals, counts)
        store(code, read(code, totals), call.out, call.kind, chunks.index)


def _add(code: Code, scalars: Any, totals: Values, values: Values) -> None:
    # No fast-math flag: the two instructions stay apart, each with its own rounding.
    weight = splat(code.builder, load(code, scalars, FLOAT))
    products = [code.builder.fmul(weight, value) for value in values]
    write(code, totals, sums(code, read(code, totals), products))


def _add_and_keep(
    code: Code, scalars: Any, totals: Values, room_of_term: Any, values: Values
) -> None:
    weight = splat(code.builder, load(code, scalars, FLOAT))
    products = [code.builder.fmul(weight, value) for value in values]
    write(code, totals, sums(code, read(code, totals), products))
    for v, product in enumerate(products):
        keep(code, room_of_term, product, 4 * LANES * v)


def _sign(code: Code, total: Any) -> Any:
    """1, -1 or 0; NaN where the total is not finite."""
    builder = code.builder
    zero = float_constant(0.0)
    above = builder.fcmp_ordered(">", total, zero)
    below = builder.fcmp_ordered("<", total, zero)
    unit = builder.select(above, float_constant(1.0), zero)
    unit = builder.select(below, float_constant(-1.0), unit)
    return builder.fadd(unit, builder.fmul(zero, total))


def _vote(
    code: Code,
    rule: Any,
    weight: Any,
    products: Values,
    signs: Values,
    totals: Values,
    counts: Values,
) -> None:
    """Add a row's term to what is kept where it agrees, or keep the largest."""
    builder = code.builder
    zero = float_constant(0.0)
    pairs = zip(products, read(code, signs), strict=True)
    terms = [builder.fmul(product, sign) for product, sign in pairs]
    largest = builder.icmp_signed("==", rule, INT(_MAX))
    with builder.if_else(largest) as (then, otherwise):
        with then:
            kept_terms = read(code, totals)
            pairs = zip(terms, kept_terms, strict=True)
            larger = [builder.fcmp_ordered(">", term, least) for term, least in pairs]
            chosen = zip(larger, terms, kept_terms, strict=True)
            write(code, totals, [builder.select(more, a, b) for more, a, b in chosen])
        with otherwise:
            agrees = [builder.fcmp_ordered(">", term, zero) for term in terms]
            more = where(code, agrees, terms, zero)
            write(code, totals, sums(code, read(code, totals), more))
            size = splat(builder, _size(code, rule, weight))
            sizes = where(code, agrees, [size] * VECTORS, zero)
            write(code, counts, sums(code, read(code, counts), sizes))


def _size(code: Code, rule: Any, weight: Any) -> Any:
    """What a term counts for: its weight's magnitude, or 1."""
    builder = code.builder
    below = builder.fcmp_ordered("<", weight, FLOAT(0.0))
    magnitude = builder.select(below, builder.fsub(FLOAT(-0.0), weight), weight)
    weighted = builder.icmp_signed("==", rule, INT(_WEIGHTED))
    return builder.select(weighted, magnitude, FLOAT(1.0))


def _finish(
    code: Code, rule: Any, base: Values, signs: Values, totals: Values, counts: Values
) -> None:
    """``base + sign · kept / count``, where the rule divides."""
    builder = code.builder
    mean = builder.icmp_signed("==", rule, INT(_MEAN))
    divides = builder.or_(mean, builder.icmp_signed("==", rule, INT(_WEIGHTED)))
    with builder.if_then(divides):
        numbers = read(code, counts)
        some = [builder.fcmp_ordered(">", number, float_constant(0.0)) for number in numbers]
        divisors = where(code, some, numbers, float_constant(1.0))
        pairs = zip(read(code, totals), divisors, strict=True)
        write(code, totals, [builder.fdiv(total, divisor) for total, divisor in pairs])
    parts = zip(read(code, signs), read(code, totals), strict=True)
    changes = [builder.fmul(sign, total) for sign, total in parts]
    write(code, totals, sums(code, read(code, base), changes))


sum_natural = _compiled(False, _emit_sum)
sum_pairs = _compiled(True, _emit_sum)
elect_natural = _compiled(False, _emit_election)
elect_pairs = _compiled(True, _emit_election)
