"""The election of a chunk's thinned terms: signs, votes, and the terms that agree, in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

from mergesearch.merging.kernels.chunks.columns import (
    FLOAT,
    INT,
    VECTORS,
    Code,
    Values,
    keep,
    load,
    read,
    variables,
    where,
    write,
)
from mergesearch.merging.kernels.chunks.narrow import FLOATS, LANES, float_constant, splat
from mergesearch.merging.kernels.chunks.rows import sums
from mergesearch.merging.kernels.chunks.terms import (
    LARGEST,
    SUM,
    AnyLane,
    Thinned,
    magnitude,
    terms_of,
    weighted_terms,
)

_LANE_BITS = ir.VectorType(ir.IntType(1), LANES)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)

#: The part of Σ |x_k| for each term below which the fp32 sum of terms does not tell the sign of
#: their fp64 sum; four times what rounding can do.
_UNSURE = 2.0**-22


def elect(code: Code, call: Thinned, totals: Values, sizes: Values, signs: Values) -> None:
    """The signs of a chunk, with the majority's where terms cancel, and its votes.

    A sum in fp32 tells the sign of the exact sum unless it is small beside its terms. Where it
    does not, the terms of the chunk are added again in fp64, which decides.
    """
    builder = code.builder
    zero = float_constant(0.0)
    keep(code, call.votes, INT(0))
    unsure = AnyLane(code)
    part = splat(builder, builder.fmul(builder.sitofp(call.count, FLOAT), FLOAT(_UNSURE)))
    pairs = zip(read(code, totals), read(code, sizes), strict=True)
    for v, (total, size) in enumerate(pairs):
        least = builder.fmul(size, part)
        above = builder.fcmp_ordered(">", total, least)
        below = builder.fcmp_ordered("<", total, builder.fneg(least))
        builder.store(_sign(code, above, below), signs[v])
        neither = builder.not_(builder.or_(above, below))
        unsure.add(builder.and_(neither, builder.fcmp_unordered("!=", size, zero)))
    with builder.if_then(unsure.found(), likely=False):
        _elect_exactly(code, call, sizes, signs)
    _count_votes(code, call, read(code, signs))
    cancelled = load(code, call.votes, INT)
    with builder.if_then(builder.icmp_unsigned("!=", cancelled, INT(0)), likely=False):
        majority = builder.bitcast(builder.trunc(call.majority, ir.IntType(32)), FLOAT)
        for v, sign in enumerate(read(code, signs)):
            lanes = builder.trunc(builder.lshr(cancelled, INT(LANES * v)), ir.IntType(LANES))
            where_cancelled = builder.bitcast(lanes, _LANE_BITS)
            chosen = builder.select(where_cancelled, splat(builder, majority), sign)
            builder.store(chosen, signs[v])


def _elect_exactly(code: Code, call: Thinned, sizes: Values, signs: Values) -> None:
    """The signs of fp64 sums, 0 where terms cancel; which these are becomes the first vote."""
    builder = code.builder
    none = ir.Constant(_DOUBLES, [0.0] * LANES)
    totals = [cgutils.alloca_once(builder, _DOUBLES) for _ in range(VECTORS)]
    for total in totals:
        builder.store(none, total)
    with terms_of(code, call) as (_term, _weight, place):
        for v, total in enumerate(totals):
            wide = builder.fpext(load(code, place, FLOATS, 4 * LANES * v), _DOUBLES)
            builder.store(builder.fadd(builder.load(total), wide), total)
    cancelled: Any = INT(0)
    for v, size in enumerate(read(code, sizes)):
        total = builder.load(totals[v])
        above = builder.fcmp_ordered(">", total, none)
        below = builder.fcmp_ordered("<", total, none)
        builder.store(_sign(code, above, below), signs[v])
        some = builder.fcmp_ordered(">", size, float_constant(0.0))
        cancels = builder.and_(builder.fcmp_ordered("==", total, none), some)
        lanes = builder.zext(builder.bitcast(cancels, ir.IntType(LANES)), INT)
        cancelled = builder.or_(cancelled, builder.shl(lanes, INT(LANES * v)))
    keep(code, call.votes, cancelled)


def _sign(code: Code, above: Any, below: Any) -> Any:
    unit = code.builder.select(above, float_constant(1.0), float_constant(0.0))
    return code.builder.select(below, float_constant(-1.0), unit)


def _count_votes(code: Code, call: Thinned, signs: Values) -> None:
    """Positions above 0 minus those below it: the second vote."""
    builder = code.builder
    balance: Any = INT(0)
    for sign in signs:
        above = builder.fcmp_ordered(">", sign, float_constant(0.0))
        below = builder.fcmp_ordered("<", sign, float_constant(0.0))
        ups, downs = (
            builder.zext(builder.ctpop(builder.bitcast(part, ir.IntType(LANES))), INT)
            for part in (above, below)
        )
        balance = builder.add(balance, builder.sub(ups, downs))
    keep(code, call.votes, balance, 8)


def add_elected(code: Code, call: Thinned, signs: Values, merged: Values) -> None:
    """Add the terms that agree with their sign, divided by their number where the rule says so.

    Where no more than two agree, halves take the place of divisions.
    """
    builder = code.builder
    counts = variables(code)
    largest = variables(code)
    write(code, counts, [float_constant(0.0)] * VECTORS)
    write(code, largest, [float_constant(0.0)] * VECTORS)
    takes_largest = builder.icmp_signed("==", call.rule, INT(LARGEST))
    with builder.if_then(takes_largest), terms_of(code, call) as (_term, _weight, place):
        _raise_largest(code, place, signs, largest)
    divides = builder.icmp_signed("!=", call.rule, INT(SUM))
    with builder.if_then(divides), terms_of(code, call) as (_term, _weight, place):
        _, agrees = _agreeing(code, place, signs, largest)
        ones = where(code, agrees, [float_constant(1.0)] * VECTORS, float_constant(0.0))
        write(code, counts, sums(code, read(code, counts), ones))
    several = AnyLane(code)
    for count in read(code, counts):
        several.add(builder.fcmp_ordered(">", count, float_constant(2.0)))
    with builder.if_else(builder.or_(takes_largest, several.found())) as (then, otherwise):
        with then:
            _add_parts(code, call, signs, (counts, largest), merged, divides=True)
        with otherwise:
            _add_parts(code, call, signs, (counts, None), merged, divides=False)


def _raise_largest(code: Code, place: Any, signs: Values, largest: Values) -> None:
    builder = code.builder
    terms, agrees = _agreeing(code, place, signs, None)
    for v, held in enumerate(read(code, largest)):
        size = magnitude(code, terms[v])
        more = builder.and_(agrees[v], builder.fcmp_ordered(">", size, held))
        builder.store(builder.select(more, size, held), largest[v])


def _agreeing(
    code: Code, place: Any, signs: Values, largest: Values | None
) -> tuple[list[Any], list[Any]]:
    """A term, and where it has the elected sign and is not below ``largest``."""
    builder = code.builder
    terms = [load(code, place, FLOATS, 4 * LANES * v) for v in range(VECTORS)]
    products = (builder.fmul(t, s) for t, s in zip(terms, read(code, signs), strict=True))
    agrees = [builder.fcmp_ordered(">", p, float_constant(0.0)) for p in products]
    if largest is None:
        return terms, agrees
    least = read(code, largest)
    large = (
        builder.fcmp_ordered(">=", magnitude(code, term), bound)
        for term, bound in zip(terms, least, strict=True)
    )
    return terms, [builder.and_(a, b) for a, b in zip(agrees, large, strict=True)]


def _add_parts(
    code: Code,
    call: Thinned,
    signs: Values,
    rule: tuple[Values, Values | None],
    merged: Values,
    divides: bool,
) -> None:
    """Add ``weight · (term / count)`` of the terms that agree."""
    builder = code.builder
    counts, largest = rule
    one = float_constant(1.0)
    several = [builder.fcmp_ordered(">", count, one) for count in read(code, counts)]
    if divides:
        divisors = where(code, several, read(code, counts), one)
    else:
        divisors = where(code, several, [float_constant(0.5)] * VECTORS, one)
    divide = builder.fdiv if divides else builder.fmul
    with weighted_terms(code, call) as (weight, place):
        terms, agrees = _agreeing(code, place, signs, largest)
        kept = where(code, agrees, terms, float_constant(0.0))
        parts = (divide(term, divisor) for term, divisor in zip(kept, divisors, strict=True))
        products = [builder.fmul(weight, part) for part in parts]
        write(code, merged, sums(code, read(code, merged), products))
