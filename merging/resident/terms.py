"""What a merge is a weighted sum of: base, rows and factors, in main memory or on a device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.kernels.dispatch import term_weights
from mergesearch.merging.kernels.forms import Form
from mergesearch.merging.kernels.lowrank import combine_factors, matrix_shape
from mergesearch.merging.kernels.span_dispatch import chosen_kernel, combine_spans
from mergesearch.merging.kernels.spans import Ranges
from mergesearch.merging.kernels.spans_decode import read
from mergesearch.merging.kernels.triton_blocks import Tables
from mergesearch.merging.resident.encodings.packing import Packing, StoredColumn, StoredTensor
from mergesearch.merging.resident.ranges import touched
from mergesearch.merging.resident.upload import copy_bytes
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout, TensorSpec

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.kernels.forms import Array
    from mergesearch.merging.kernels.triton_factors import Matrix
    from mergesearch.merging.resident.arena import Arenas


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


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of a merge, wherever they lie.

    Attributes:
        packing: Positions in the memory.
        form: How base and rows combine.
        memory: uint8 ``(bytes,)``.
        angles: For ``slerp``: the angle between base and row over the flat index.
        tables: What kernels keep between merges.
    """

    packing: Packing
    form: Form
    memory: Array
    angles: Field | None = None
    tables: Tables = field(default_factory=Tables)

    @classmethod
    def of(cls, arenas: Arenas) -> Terms:
        """The terms of arenas in main memory."""
        return cls(arenas.packing, arenas.form, arenas.memory, arenas.angles)

    @classmethod
    def of_arrays(
        cls, layout: Layout, form: Form, base: npt.NDArray[Any], rows: npt.NDArray[Any]
    ) -> Terms:
        """The terms of base ``(size,)`` and rows ``(K, size)`` in memory, all of one dtype."""
        dtype: Any = str(base.dtype)
        stored = StoredTensor(dtype, (StoredColumn(dtype),) * len(rows))
        specs = [spec for spec in layout.tensors if spec.size]
        packing = Packing(layout, len(rows), dtype, {spec.name: stored for spec in specs})
        memory = np.zeros(packing.size, np.uint8)
        for spec in specs:
            parts = packing.parts[spec.name]
            for offset, array in zip((parts.base, *parts.numbers), (base, *rows), strict=True):
                data = np.ascontiguousarray(array[spec.start : spec.stop]).view(np.uint8)
                memory[offset : offset + data.size] = data
        return cls(packing, form, memory)

    @property
    def size(self) -> int:
        """Length of the flat index."""
        return self.packing.layout.size

    @cached_property
    def factors(self) -> tuple[StoredFactors, ...]:
        """Rows of tensors that are kept as factors."""
        return tuple(self._factors_of(spec) for spec in self.packing.factored)

    def _factors_of(self, spec: TensorSpec) -> StoredFactors:
        offsets = self.packing.parts[spec.name].factors
        ranks = self.packing.stored[spec.name].ranks
        assert offsets is not None
        assert ranks is not None
        m, n = matrix_shape(spec.shape)
        rank = sum(ranks)
        left = as_array(self.memory, offsets[0], m * rank, self.packing.dtype).reshape(m, rank)
        right = as_array(self.memory, offsets[1], rank * n, self.packing.dtype).reshape(rank, n)
        return StoredFactors(spec, left, right, self.packing.owner_of(spec))

    def read(self, start: int, stop: int) -> tuple[Array, Array]:
        """Base ``(n,)`` and rows ``(K, n)`` at positions, in the accumulation dtype.

        Zero in the padding; rows of tensors that are kept as factors are zero too.
        """
        near = self.packing.spans_near(start, stop)
        base: Any
        base, rows = read(self.memory, near, start, stop) if near else self._zeros(stop - start)
        for spec in self.packing.factored:
            low = max(start, spec.start)
            high = min(stop, spec.stop)
            if low < high:
                base[low - start : high - start] = self._base(spec, low, high)
        return base, rows

    def _zeros(self, count: int) -> tuple[Array, Array]:
        """Base and rows of positions that no span has."""
        shape = (self.packing.directions + 1, count)
        if isinstance(self.memory, np.ndarray):
            numbers = np.zeros(shape, self.packing.dtype)
            return numbers[0], numbers[1:]
        import torch

        dtype = getattr(torch, self.packing.dtype)
        tensor = torch.zeros(shape, dtype=dtype, device=self.memory.device)
        return tensor[0], tensor[1:]

    def base_of(self, spec: TensorSpec) -> Array:
        """The base of one tensor ``(size,)``, in the accumulation dtype."""
        return self._base(spec, spec.start, spec.stop)

    def _base(self, spec: TensorSpec, start: int, stop: int) -> Array:
        base: Array = read(self.memory, [self.packing.base_span(spec)], start, stop)[0]
        return base


def combine_terms(
    terms: Terms,
    coefficients: Field,
    out: Array,
    *,
    threads: int | None = None,
    only: Ranges | None = None,
) -> None:
    """Write the merge of ``terms`` with ``coefficients`` into ``out`` ``(size,)``.

    Padding between tensors is left alone.

    Args:
        terms: What is summed.
        coefficients: Over the flat index.
        out: On the device of the terms, fp32, fp64, bf16 or fp16.
        threads: CPU threads; None takes ``OMP_NUM_THREADS``, or 1.
        only: Positions that must be merged, in main memory alone; a tensor that is kept as factors
            is merged whole if it has some, all else is left as it is.

    Raises:
        RecipeError: If the field does not fit the terms.
    """
    packing = terms.packing
    for what, expected, received in (
        ("directions", packing.directions, coefficients.directions),
        ("positions", packing.layout.size, coefficients.size),
    ):
        if expected != received:
            raise RecipeError(f"arena: expected a field of {expected} {what}, received {received}")
    combine_spans(
        terms.memory,
        packing.spans,
        coefficients,
        terms.form,
        out,
        angles=terms.angles,
        threads=threads,
        tables=terms.tables,
        only=only,
    )
    if chosen_kernel(terms.memory, out, packing.dtype == "float64", "auto") == "triton":
        _combine_factors_on_gpu(terms, coefficients, out)
        return
    met = set(touched(packing.factored, only))
    for stored in (own for own in terms.factors if own.spec in met):
        start = stored.spec.start
        stop = stored.spec.stop
        combine_factors(
            terms.base_of(stored.spec),
            stored.left,
            stored.right,
            stored.owner,
            coefficients.restrict(start, stop),
            out[start:stop],
            threads=threads,
        )


def _combine_factors_on_gpu(terms: Terms, coefficients: Field, out: Array) -> None:
    """Merge all tensors that are kept as factors in a few launches."""
    from mergesearch.merging.kernels import triton_factors
    from mergesearch.merging.kernels.torch_kernel import as_tensor

    weights = term_weights(coefficients, "delta")[1:]
    triton_factors.combine(
        as_tensor(terms.memory),
        [_matrix_of(terms.packing, spec) for spec in terms.packing.factored],
        weights,
        coefficients.boundaries,
        as_tensor(out),
        tables=terms.tables,
    )


def _matrix_of(packing: Packing, spec: TensorSpec) -> Matrix:
    from mergesearch.merging.kernels.triton_factors import Matrix

    factors = packing.parts[spec.name].factors
    assert factors is not None
    rows, columns = matrix_shape(spec.shape)
    base = packing.base_span(spec).base
    return Matrix(spec.start, rows, columns, base, *factors, packing.owner_of(spec))


def on_device(terms: Terms, device: str) -> Terms:
    """The terms on a device; what lies there already, or is for ``cpu``, stays where it is.

    The arena travels in chunks, so that no second copy of it is made on the way.
    """
    if device == "cpu" or not isinstance(terms.memory, np.ndarray):
        return terms
    import torch

    memory = torch.empty(len(terms.memory), dtype=torch.uint8, device=device)
    copy_bytes(terms.memory, memory)
    return replace(terms, memory=memory)


def as_array(memory: Array, offset: int, count: int, dtype: str) -> Array:
    """``count`` fp32 or fp64 numbers of an arena, as a view."""
    width = np.dtype(dtype).itemsize
    part = memory[offset : offset + count * width]
    if isinstance(part, np.ndarray):
        numbers: npt.NDArray[Any] = part.view(dtype)
        return numbers
    import torch

    tensor: torch.Tensor = part.view(getattr(torch, dtype))
    return tensor
