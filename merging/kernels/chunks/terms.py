"""What the vector code of thinning reads and leaves: terms, their weights, a room in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

from mergesearch.merging.kernels.chunks.columns import CHUNK, FLOAT, INT, Code, load
from mergesearch.merging.kernels.chunks.narrow import FLOATS, INTS, LANES, int_constant, splat

#: Numbers of a term, int64: kind, address of its first element, whether elements are dropped by
#: chance, the bits of two fp32 numbers (a factor, and the least magnitude that is kept), the chance
#: of survival times 2³², the two words of the key of its bits, and whether its numbers are a task
#: vector rather than an expert.
TERM_FIELDS = 9
(KIND, ADDRESS, DRAWN, FACTOR, LIMIT, CHANCE, KEY, OTHER_KEY, IS_CHANGE) = range(TERM_FIELDS)

#: Rules of an election, as numbers; 0 elects nothing and adds all terms.
SUM_ALL, MEAN, SUM, LARGEST = range(4)

#: fp32 numbers that a chunk leaves in its room: the base, what rounding lost and what changed,
#: squared and summed in 16 lanes, the largest bits of a change; then the terms, one after another.
BASE_AT, LOST_AT, CHANGE_AT, ODD_AT = 0, CHUNK, CHUNK + LANES, CHUNK + 2 * LANES
TERMS_AT = CHUNK + 3 * LANES

#: Votes of a chunk: bits of the positions that cancel, positions above 0 minus those below.
VOTES = 2

MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True)
class Thinned:
    """The arguments of a call, all int64.

    Attributes:
        terms: Address of the terms ``(1 + count, TERM_FIELDS)``, int64, base first.
        weights: Address of the weights ``(count,)``, fp32.
        count: Number of experts.
        chunk: Which chunk of the arrays at the terms' addresses.
        counter: Of the random bits of its first eight elements.
        rule: Of the election.
        majority: Bits of the sign, fp32, of positions that cancel.
        out: Address of the result, 0 where only votes are counted.
        kind: Of the result's numbers: 0 for fp32, 1 for bf16.
        room: Address of fp32 numbers ``(TERMS_AT + count · CHUNK,)``.
        votes: Address of int64 numbers ``(VOTES,)``.
    """

    terms: Any
    weights: Any
    count: Any
    chunk: Any
    counter: Any
    rule: Any
    majority: Any
    out: Any
    kind: Any
    room: Any
    votes: Any


@contextmanager
def terms_of(code: Code, call: Thinned) -> Iterator[tuple[Any, Any, Any]]:
    """A loop over the experts: addresses of the term, its weight, and its place in the room."""
    builder = code.builder
    first = builder.add(call.room, INT(4 * TERMS_AT))
    with cgutils.for_range(builder, call.count) as rows:
        row = builder.add(rows.index, INT(1))
        term = builder.add(call.terms, builder.mul(row, INT(8 * TERM_FIELDS)))
        weight = builder.add(call.weights, builder.mul(rows.index, INT(4)))
        yield term, weight, builder.add(first, builder.mul(rows.index, INT(4 * CHUNK)))


@contextmanager
def weighted_terms(code: Code, call: Thinned) -> Iterator[tuple[Any, Any]]:
    """A loop over experts whose weight is not 0: it in all lanes, and the term's place."""
    builder = code.builder
    with terms_of(code, call) as (_term, at, place):
        weight = load(code, at, FLOAT)
        with builder.if_then(builder.fcmp_unordered("!=", weight, FLOAT(0.0))):
            yield splat(builder, weight), place


def magnitude(code: Code, value: Any) -> Any:
    """A vector without its signs."""
    builder = code.builder
    bits = builder.and_(builder.bitcast(value, INTS), int_constant(MAGNITUDE))
    return builder.bitcast(bits, FLOATS)


class AnyLane:
    """Whether a condition holds in some lane of some vector."""

    def __init__(self, code: Code) -> None:
        self._builder = code.builder
        self._held: Any = None

    def add(self, lanes: Any) -> None:
        """Another vector of conditions."""
        self._held = lanes if self._held is None else self._builder.or_(self._held, lanes)

    def found(self) -> Any:
        """One bit."""
        bits = self._builder.bitcast(self._held, ir.IntType(LANES))
        return self._builder.icmp_unsigned("!=", bits, ir.IntType(LANES)(0))
