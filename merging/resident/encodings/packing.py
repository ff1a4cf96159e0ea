"""Where base, rows and factors of every tensor lie in an arena, in bytes, and how they are stored.

Tensors follow one another in the order of the layout, each with everything that a merge of it
reads: the base as its checkpoint stores it, then the numbers of the rows, their masks and scales,
or their factors. So a stretch of layers is a stretch of bytes, which a card that holds these layers
reads alone. Every tensor has room for the padding that follows it in the flat index, so that
neighbours are neighbours for a kernel too; it is zero.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mergesearch.merging.kernels.lowrank import matrix_shape
from mergesearch.merging.kernels.spans import (
    ITEMSIZE,
    PACK_BLOCK,
    SCALE_BLOCK,
    Column,
    ColumnDtype,
    Span,
)
from mergesearch.merging.tensors.layout import ALIGNMENT, Layout, TensorSpec

#: Every part of a tensor starts at a multiple of this many bytes: two cache lines, and eight of the
#: widest loads of a GPU.
ALIGNED_BYTES = 128


@dataclass(frozen=True)
class StoredColumn:
    """How one row of a tensor is stored; the fields are those of :class:`Column`.

    Attributes:
        dtype: Of the numbers; ``int8`` numbers have scales.
        minus_base: Whether the row is the number minus the base.
        scale: What the row is multiplied with.
        masked: Whether the row has a mask.
        packed: How many numbers are stored where only those of kept elements are; None where every
            element has its number.
    """

    dtype: ColumnDtype
    minus_base: bool = False
    scale: float = 1.0
    masked: bool = False
    packed: int | None = None


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor is stored.

    Attributes:
        base: dtype of the base.
        columns: Its rows; empty if they are kept as factors.
        shared: Whether rows are divided by the number of rows that keep a position.
        ranks: Number of factor terms of every direction, or None where rows are kept.
    """

    base: ColumnDtype
    columns: tuple[StoredColumn, ...] = ()
    shared: bool = False
    ranks: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StoredTensor:
        """From :meth:`to_dict`.

        Raises:
            KeyError, TypeError: If it is not such.
        """
        columns = tuple(StoredColumn(**column) for column in data["columns"])
        ranks = None if data["ranks"] is None else tuple(data["ranks"])
        return cls(data["base"], columns, data["shared"], ranks)


@dataclass(frozen=True)
class TensorParts:
    """Offsets of the parts of one tensor, in bytes from the start of the arena.

    Attributes:
        base: Of the base.
        numbers: Of every row.
        masks, scales, starts: Of every row; None where it has none.
        factors: Of the left and the right factor, or None.
        stop: Of what follows the tensor.
    """

    base: int
    numbers: tuple[int, ...]
    masks: tuple[int | None, ...]
    scales: tuple[int | None, ...]
    starts: tuple[int | None, ...]
    factors: tuple[int, int] | None
    stop: int


@dataclass(frozen=True)
class Stretch:
    """Positions ``start:stop`` of the flat index without a tensor that is kept as factors."""

    start: int
    stop: int


@dataclass(frozen=True)
class Packing:
    """Offsets in an arena.

    Attributes:
        layout: Of the base.
        directions: Number of rows K.
        dtype: Of every sum and of factors: ``float32`` or ``float64``.
        stored: How each tensor that is not empty is stored.
    """

    layout: Layout
    directions: int
    dtype: ColumnDtype
    stored: Mapping[str, StoredTensor]

    @cached_property
    def parts(self) -> dict[str, TensorParts]:
        """Offsets of the parts of every tensor."""
        parts = {}
        at = 0
        for spec in self.layout.tensors:
            if spec.size:
                parts[spec.name] = self.parts_of(spec, at)
                at = parts[spec.name].stop
        return parts

    def parts_of(self, spec: TensorSpec, at: int) -> TensorParts:
        """Offsets of the parts of a tensor that starts at byte ``at``."""
        return _parts_of(spec, self.stored[spec.name], at, ITEMSIZE[self.dtype])

    @property
    def size(self) -> int:
        """Bytes of the arena."""
        return max((parts.stop for parts in self.parts.values()), default=0)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """What a merge reads, one span for every tensor that is not kept as factors."""
        return tuple(
            self._span(spec)
            for spec in self.layout.tensors
            if spec.size and self.stored[spec.name].ranks is None
        )

    @cached_property
    def _starts(self) -> list[int]:
        return [span.start for span in self.spans]

    def spans_near(self, start: int, stop: int) -> tuple[Span, ...]:
        """The spans that hold some of the positions ``start:stop``."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        near = self.spans[first : bisect_left(self._starts, stop)]
        return near[1:] if near and near[0].stop <= start else near

    @cached_property
    def factored(self) -> tuple[TensorSpec, ...]:
        """Tensors whose rows are kept as factors."""
        return tuple(
            spec
            for spec in self.layout.tensors
            if spec.size and self.stored[spec.name].ranks is not None
        )

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """Positions between tensors that are kept as factors; neighbouring tensors are joined."""
        specs = self.layout.tensors
        stops = [spec.start for spec in specs[1:]] + [self.layout.size]
        names = {spec.name for spec in self.factored}
        joined: list[Stretch] = []
        for spec, stop in zip(specs, stops, strict=True):
            if spec.name in names or stop == spec.start:
                continue
            if joined and joined[-1].stop == spec.start:
                joined[-1] = Stretch(joined[-1].start, stop)
            else:
                joined.append(Stretch(spec.start, stop))
        return tuple(joined)

    def owner_of(self, spec: TensorSpec) -> tuple[int, ...]:
        """Direction of each factor term of a tensor that is kept as factors."""
        ranks = self.stored[spec.name].ranks or ()
        return tuple(np.repeat(np.arange(len(ranks)), ranks).tolist())

    def base_span(self, spec: TensorSpec) -> Span:
        """The base of one tensor, without rows."""
        column = Column(self.stored[spec.name].base, self.parts[spec.name].base)
        return Span(spec.start, spec.start + padded(spec), column, ())

    def _span(self, spec: TensorSpec) -> Span:
        stored = self.stored[spec.name]
        parts = self.parts[spec.name]
        rows = tuple(
            Column(
                *(column.dtype, number, column.minus_base, column.scale, mask, scales, starts),
                count=column.packed or 0,
            )
            for column, number, mask, scales, starts in zip(
                stored.columns,
                parts.numbers,
                parts.masks,
                parts.scales,
                parts.starts,
                strict=True,
            )
        )
        stop = spec.start + padded(spec)
        return Span(spec.start, stop, Column(stored.base, parts.base), rows, stored.shared)


def _parts_of(spec: TensorSpec, stored: StoredTensor, at: int, itemsize: int) -> TensorParts:
    """Offsets of the parts of a tensor that starts at byte ``at``."""
    base = at
    size = padded(spec)
    at = _aligned(base + size * ITEMSIZE[stored.base])
    numbers: list[int] = []
    masks: list[int | None] = []
    scales: list[int | None] = []
    starts: list[int | None] = []
    for column in stored.columns:
        numbers.append(at)
        kept = size if column.packed is None else column.packed
        at = _aligned(at + kept * ITEMSIZE[column.dtype])
        masks.append(at if column.masked else None)
        at = _aligned(at + mask_bytes(size)) if column.masked else at
        scales.append(at if column.dtype == "int8" else None)
        at = _aligned(at + 4 * scale_count(size)) if column.dtype == "int8" else at
        starts.append(None if column.packed is None else at)
        at = at if column.packed is None else _aligned(at + 4 * start_count(size))
    factors = None
    if stored.ranks is not None:
        m, n = matrix_shape(spec.shape)
        rank = sum(stored.ranks)
        right = _aligned(at + m * rank * itemsize)
        factors = at, right
        at = _aligned(right + rank * n * itemsize)
    rows = (tuple(numbers), tuple(masks), tuple(scales), tuple(starts))
    return TensorParts(base, *rows, factors, at)


def padded(spec: TensorSpec) -> int:
    """Elements of a tensor and of the padding behind it."""
    return -(-spec.size // ALIGNMENT) * ALIGNMENT


def mask_bytes(elements: int) -> int:
    """Bytes of the mask of a row."""
    return -(-elements // 8)


def scale_count(elements: int) -> int:
    """Number of scales of a row of int8 numbers."""
    return -(-elements // SCALE_BLOCK)


def start_count(elements: int) -> int:
    """Number of starts of a row of packed numbers."""
    return -(-elements // PACK_BLOCK)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
