"""Where base, rows and factors lie in an arena, and how they are combined from there.

The base has room for every tensor of the flat index. Tensors whose rows are kept as factors
have none in the rows: the others are packed together, in stretches that keep their order and
alignment. Factors follow the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Offsets in an arena, in elements.

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
        """Positions that lie in the rows, neighbouring tensors joined."""
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
    def _factor_offsets(self) -> tuple[dict[str, tuple[int, int]], int]:
        """Offsets of the two factors of every tensor that has them, and the end of the arena."""
        at = self.layout.size + self.directions * self.row
        offsets = {}
        for name, ranks in self.ranks.items():
            m, n = matrix_shape(self.layout.by_name[name].shape)
            right = at + _aligned(m * sum(ranks))
            offsets[name] = at, right
            at = right + _aligned(sum(ranks) * n)
        return offsets, at

    @property
    def size(self) -> int:
        """Length of the arena."""
        return self._factor_offsets[1]

    def in_row(self, start: int) -> int | None:
        """Offset within a row of a position of the flat index, None if it is not in the rows."""
        for stretch in self.stretches:
            if stretch.start <= start < stretch.stop:
                return stretch.at + start - stretch.start
        return None

    def offsets_of(self, spec: TensorSpec) -> list[int]:
        """Offsets of a tensor in the base, and of its rows or of its two factors."""
        if spec.name in self.ranks:
            return [spec.start, *self._factor_offsets[0][spec.name]]
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
            (left, right) = self._factor_offsets[0][name]
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
    """:func:`mergesearch.merging.kernels.combine` over a packed arena.

    The padding behind a tensor of factors is left alone.

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
