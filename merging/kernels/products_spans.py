"""Inner products of one vector with base and rows as they are stored, over segments.

As :func:`mergesearch.merging.kernels.products.products` on the rows that the spans stand for, with
the same bits: the same pieces, and the same order of additions within them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import InputError
from mergesearch.merging.kernels.dispatch import default_threads
from mergesearch.merging.kernels.forms import Kernel
from mergesearch.merging.kernels.host import as_host_fp32, host_bytes
from mergesearch.merging.kernels.products import PIECE, block_of, cut, fixed_sum, joined
from mergesearch.merging.kernels.span_dispatch import runs_on_triton
from mergesearch.merging.kernels.spans import Span
from mergesearch.merging.kernels.spans_decode import directions, is_wide, read
from mergesearch.merging.kernels.triton_blocks import Tables

if TYPE_CHECKING:
    from mergesearch.merging.kernels.forms import Array

_Wide = npt.NDArray[np.float64]
_Index = npt.NDArray[np.int64]


def span_products(
    memory: Array,
    spans: Sequence[Span],
    vector: Array,
    boundaries: _Index,
    *,
    base: bool = False,
    from_base: bool = False,
    kernel: Kernel = "auto",
    threads: int | None = None,
    tables: Tables | None = None,
) -> _Wide:
    """Inner products of ``vector`` with the decoded rows, over segments.

    Neighbouring spans are worked through as one stretch; positions between stretches add nothing.

    Args:
        memory: The arena, ``(bytes,)``, uint8.
        spans: In the order of the flat index.
        vector: ``(n,)``, on the device of the arena.
        boundaries: ``(segments + 1,)``, from 0 to n.
        base: Put the products with the base first.
        from_base: With ``base``, rows are taken minus the base, which is subtracted in fp64 before
            anything is summed.
        kernel: ``auto`` takes numba for an arena and a contiguous fp32 vector in main memory.
        threads: CPU threads; None takes ``OMP_NUM_THREADS``, or 1.
        tables: What the Triton kernels, which serve GPUs, keep between calls.

    Returns:
        fp64 ``(K, segments)``, or ``(1 + K, segments)`` with the base.

    Raises:
        InputError: If the vector's length differs, or the numba kernel is asked for arrays that it
            cannot read.
    """
    if tuple(vector.shape) != (int(boundaries[-1]),):
        raise InputError(
            f"span_products: expected a vector of shape {(int(boundaries[-1]),)}, received "
            f"{tuple(vector.shape)}"
        )
    if kernel == "auto" and runs_on_triton(memory) and not is_wide(spans):
        from mergesearch.merging.kernels import triton_products
        from mergesearch.merging.kernels.torch_kernel import as_tensor

        return triton_products.products(
            as_tensor(memory), spans, as_tensor(vector), boundaries,
            base=base, from_base=from_base, tables=tables,
        )  # fmt: skip
    threads = default_threads() if threads is None else threads
    host = None if kernel == "torch" or is_wide(spans) else as_host_fp32([vector])
    arena = host_bytes(memory)
    compiled = host is not None and arena is not None
    if kernel == "numba" and not compiled:
        raise InputError(
            "span_products: kernel 'numba' expects an arena and a contiguous float32 vector in "
            "main memory; use kernel='auto'"
        )
    result = np.zeros((directions(spans) + base, len(boundaries) - 1))
    for stretch in stretches(spans):
        start = stretch[0].start
        cuts, first = within(boundaries, start, stretch[-1].stop)
        length = PIECE if compiled else block_of(vector)
        starts, stops, owners = cut(cuts, length)
        if compiled and arena is not None and host is not None:
            from mergesearch.merging.kernels import products_spans_numba

            sums = products_spans_numba.products(
                arena, stretch, host[0], starts + start, stops + start, base, from_base, threads
            )
        else:
            limits = list(zip((starts + start).tolist(), (stops + start).tolist(), strict=True))
            sums = _by_torch(memory, stretch, vector, limits, base, from_base, threads)
        result[:, first : first + len(cuts) - 1] += joined(sums, owners, len(cuts) - 1)
    return result


def stretches(spans: Sequence[Span]) -> Iterator[tuple[Span, ...]]:
    """Spans that follow each other without a gap, together."""
    together: list[Span] = []
    for span in spans:
        if together and together[-1].stop != span.start:
            yield tuple(together)
            together = []
        together.append(span)
    if together:
        yield tuple(together)


def within(boundaries: _Index, start: int, stop: int) -> tuple[_Index, int]:
    """Boundaries within ``start:stop``, re-based to 0, and the number of the first segment."""
    first = int(np.searchsorted(boundaries, start, side="right")) - 1
    last = int(np.searchsorted(boundaries, stop, side="left"))
    return np.clip(boundaries[first : last + 1], start, stop) - start, first


def _by_torch(
    memory: Array,
    spans: Sequence[Span],
    vector: Array,
    limits: Sequence[tuple[int, int]],
    base: bool,
    from_base: bool,
    threads: int,
) -> _Wide:
    import torch

    from mergesearch.merging.kernels.torch_kernel import as_tensor, torch_threads

    flat = as_tensor(vector)
    arena = as_tensor(memory)
    sums = torch.zeros(
        (directions(spans) + base, len(limits)), dtype=torch.float64, device=flat.device
    )
    with torch.no_grad(), torch_threads(threads):
        for piece, (start, stop) in enumerate(limits):
            wide = flat[start:stop].double()
            terms: list[Any] = []
            origin, rows = read(arena, spans, start, stop, base=base)
            terms = [row.double() for row in rows]
            if origin is not None:
                origin = origin.double()
                terms = [origin, *([t - origin for t in terms] if from_base else terms)]
            for row, term in enumerate(terms):
                sums[row, piece] = fixed_sum(wide * term)  # Σ_i v_i r_i, or Σ_i v_i (r_i − b_i)
    return sums.cpu().numpy()
