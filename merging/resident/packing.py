"""Where base, rows and factors lie in an arena, and how they are combined from there.

The base has its place for every tensor of the flat index. Tensors whose rows are kept as factors
have none in the rows: the others are packed together, in stretches that keep their order and
alignment. Factors follow the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.kernels.forms import Form
from mergesearch.merging.kernels.lowrank import combine_factors, matrix_shape
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import ALIGNMENT, Layout, TensorSpec

if TYPE_CHECKING:
    from mergesearch.merging.kernels.forms import Array
    from mergesearch.merging.operators.base import Basis
    from mergesearch.merging.tensors.source import Factors


@dataclass(frozen=True)
class Stretch:
    """Positions ``start:stop`` of the flat index that lie in the rows from ``at`` on."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """The rows of one tensor as factors.

    Attributes:
        spec: The tensor.
        left: ``(m, R)``.
        right: ``(R, n)``.
        owner: Direction of each of the R terms.
    """

    spec: TensorSpec
    left: Array
    right: Array
    owner: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """Places in an arena, in elements.

    Attributes:
        layout: Of the base.
        directions: Number of rows K.
        ranks: Tensors that are kept as factors: name -> number of terms of each direction.
    """

    layout: Layout
    directions: int
    ranks: Mapping[str, Sequence[int]]

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """What lies in the rows, neighbouring tensors joined."""
        specs = self.layout.tensors
        stops = [spec.start for spec in specs[1:]] + [self.layout.size]
        joined: list[Stretch] = []
        at = 0
        for spec, stop in zip(specs, stops, strict=True):
            if spec.name in self.ranks or stop == spec.start:
                continue
            if joined and joined[-1].stop == spec.start:
                joined[-1] = Stretch(joined[-1].start, stop, joined[-1].at)
            else:
                joined.append(Stretch(spec.start, stop, at))
            at += stop - spec.start
        return tuple(joined)

    @property
    def row(self) -> int:
        """Length of a row."""
        return sum(stretch.stop - stretch.start for stretch in self.stretches)

    @cached_property
    def _places(self) -> tuple[dict[str, tuple[int, int]], int]:
        at = self.layout.size + self.directions * self.row
        places = {}
        for name, ranks in self.ranks.items():
            m, n = matrix_shape(self.layout.by_name[name].shape)
            right = at + _aligned(m * sum(ranks))
            places[name] = at, right
            at = right + _aligned(sum(ranks) * n)
        return places, at

    @property
    def size(self) -> int:
        """Length of the arena."""
        return self._places[1]

    def in_row(self, start: int) -> int | None:
        """Place within a row of a position of the flat index, None if it is not in the rows."""
        for stretch in self.stretches:
            if stretch.start <= start < stretch.stop:
                return stretch.at + start - stretch.start
        return None

    def places_of(self, spec: TensorSpec) -> list[int]:
        """Where a tensor of the base and its rows begin, or its base and its two factors."""
        if spec.name in self.ranks:
            return [spec.start, *self._places[0][spec.name]]
        at = self.in_row(spec.start)
        rows = (
            []
            if at is None
            else [self.layout.size + k * self.row + at for k in range(self.directions)]
        )
        return [spec.start, *rows]

    def split(
        self, arena: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], tuple[StoredFactors, ...]]:
        """Base ``(size,)``, rows ``(K, row)`` and factors of an arena ``(size,)``, as views."""
        first = self.layout.size
        rows = arena[first : first + self.directions * self.row].reshape(self.directions, self.row)
        factors = []
        for name, ranks in self.ranks.items():
            spec = self.layout.by_name[name]
            (left, right) = self._places[0][name]
            (m, n) = matrix_shape(spec.shape)
            rank = sum(ranks)
            owner = tuple(np.repeat(np.arange(len(ranks)), ranks).tolist())
            pair = (
                arena[left : left + m * rank].reshape(m, rank),
                arena[right : right + rank * n].reshape(rank, n),
            )
            factors.append(StoredFactors(spec, *pair, owner))
        return arena[:first], rows, tuple(factors)


def combine_packed(
    packing: Packing,
    base: Array,
    rows: Array,
    factors: Sequence[StoredFactors],
    field: Field,
    form: Form,
    out: Array,
    *,
    angles: Field | None = None,
    threads: int | None = None,
) -> None:
    """:func:`mergesearch.merging.kernels.combine` over a packed arena; the padding behind a tensor
    of factors is left alone.

    Raises:
        RecipeError: If the field does not fit the arena.
    """
    for what, expected, received in (
        ("directions", packing.directions, field.directions),
        ("positions", packing.layout.size, field.size),
    ):
        if expected != received:
            raise RecipeError(f"arena: expected a field of {expected} {what}, received {received}")
    for stretch in packing.stretches:
        start = stretch.start
        stop = stretch.stop
        row_part = rows[:, stretch.at : stretch.at + stop - start]
        part = field.restrict(start, stop)
        arc = None if angles is None else angles.restrict(start, stop)
        combine(
            base[start:stop], row_part, part, form, out[start:stop], angles=arc, threads=threads
        )
    for stored in factors:
        start = stored.spec.start
        stop = stored.spec.stop
        left = stored.left
        right = stored.right
        part = field.restrict(start, stop)
        combine_factors(
            base[start:stop], left, right, stored.owner, part, out[start:stop], threads=threads
        )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


#: Terms of a product that take as long as one element of a dense row. Measured on two cores of an
#: EPYC with AVX2: 28 ps per term from the cache, 250 ps per element of a row from memory.
TERMS_PER_ROW = 9


#: How much slower a merge may become for each factor that it becomes smaller, and how much at most.
SLOWER_PER_SMALLER = 0.25


SLOWEST = 8.0


def worth_keeping(shape: Sequence[int], rank: int, directions: int) -> bool:
    """Whether K rows of a tensor are better kept as factors of a total rank R; decided by shapes
    alone.

    Kept whole, the rows take ``K · m · n`` numbers of memory, and a merge reads them all; kept as
    factors, ``R · (m + n)`` numbers, and a merge adds R terms per element from the cache.
    Evaluation, not merging, takes the time of a trial, and the dense rows of a large model may not
    fit in memory at all: a merge may become slower by a quarter of the factor by which the rows
    become smaller, but at most 8 times. Rank 0, a tensor that no expert changes, is always worth
    it.
    """
    m, n = matrix_shape(shape)
    if rank == 0 or m * n == 0:
        return True
    smaller = directions * m * n / (rank * (m + n))
    slower = rank / (TERMS_PER_ROW * directions)
    return smaller > 1 and slower <= min(SLOWEST, max(1.0, SLOWER_PER_SMALLER * smaller))


def low_rank_factors(
    basis: Basis, spec: TensorSpec, postprocessed: Collection[str] = ()
) -> Factors | None:
    """The factors of a tensor's rows where the basis has them and they are :func:`worth_keeping`,
    else None.

    Args:
        basis: Of an operator.
        spec: The tensor.
        postprocessed: Tensors that are more than a weighted sum, whose rows are always whole.
    """
    if (
        basis.factors is None
        or basis.form != "delta"
        or spec.name in postprocessed
        or spec.size == 0
    ):
        return None
    factors = basis.factors(spec.name)
    if factors is None or not worth_keeping(spec.shape, len(factors.owner), basis.directions):
        return None
    return factors
