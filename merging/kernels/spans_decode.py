"""Rows of spans decoded for a range of positions: for norms, Gram matrices and post-processing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.kernels.spans import Span

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.kernels.forms import Array


def read(
    memory: Array, spans: Sequence[Span], start: int, stop: int, *, base: bool = True
) -> tuple[Any, Any]:
    """Base ``(n,)`` and rows ``(K, n)`` at positions ``start:stop``, zeros between the spans.

    fp32, or fp64 where a column is: numpy arrays for an arena in main memory that is numpy, else
    tensors on its device.

    Args:
        memory: The arena, ``(bytes,)``, uint8.
        spans: In the order of the flat index.
        start: First position.
        stop: Position after the last.
        base: Whether the base is wanted; it is None otherwise.
    """
    if not isinstance(memory, np.ndarray):
        return _by_torch(memory, spans, start, stop, base)
    if not is_wide(spans):
        return _by_numba(memory, spans, start, stop, base)
    from mergesearch.merging.kernels.torch_kernel import as_tensor

    first, rows = _by_torch(as_tensor(memory), spans, start, stop, base)
    return None if first is None else first.numpy(), rows.numpy()


def is_wide(spans: Sequence[Span]) -> bool:
    """Whether a column is fp64, so that everything is worked out in fp64."""
    return any(column.dtype == "float64" for span in spans for column in (span.base, *span.rows))


def directions(spans: Sequence[Span]) -> int:
    """The number of rows K."""
    return len(spans[0].rows) if spans else 0


def _by_numba(
    memory: npt.NDArray[np.uint8], spans: Sequence[Span], start: int, stop: int, base: bool
) -> tuple[Any, Any]:
    from mergesearch.merging.kernels.chunks.ranges import decode
    from mergesearch.merging.kernels.spans_numba import SpanTable

    near = [span for span in spans if span.start < stop and span.stop > start]
    table = SpanTable.of(memory, near)
    first = np.zeros(stop - start, np.float32) if base else None
    rows = np.zeros((directions(spans), stop - start), np.float32)
    decode(
        table.columns,
        table.scales,
        table.limits,
        start,
        stop,
        0 if first is None else first.ctypes.data,
        rows.ctypes.data,
        rows.strides[0],
    )
    return first, rows


def _by_torch(
    memory: torch.Tensor, spans: Sequence[Span], start: int, stop: int, base: bool
) -> tuple[Any, Any]:
    import torch

    from mergesearch.merging.kernels.spans_torch import decode

    wide = torch.float64 if is_wide(spans) else torch.float32
    count = directions(spans)
    values = torch.zeros((count + 1, stop - start), dtype=wide, device=memory.device)
    terms = range(0 if base else 1, count + 1)
    with torch.no_grad():
        for span in spans:
            low = max(start, span.start)
            high = min(stop, span.stop)
            if low < high:
                for term, block in decode(memory, span, low, high, terms, wide).items():
                    values[term, low - start : high - start] = block
    return values[0] if base else None, values[1:]
