"""``combine`` for rows as they are stored, in blocked torch: any dtype, any device.

The arena is a tensor of bytes on the device; blocks of columns are viewed in place and decoded in
the accumulation dtype, fp64 where anything is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergesearch.merging.kernels.spans import (
    ITEMSIZE,
    PACK_BLOCK,
    SCALE_BLOCK,
    Column,
    Ranges,
    Span,
    pieces,
)
from mergesearch.merging.kernels.torch_kernel import (
    ACCELERATOR_BLOCK,
    CPU_BLOCK,
    as_tensor,
    elect_block,
    sum_block,
    torch_threads,
)

_DTYPES = {name: getattr(torch, name) for name in (*ITEMSIZE, "int32")}


def combine(
    memory: torch.Tensor,
    spans: Sequence[Span],
    weights: npt.NDArray[Any],
    boundaries: npt.NDArray[np.int64],
    out: Any,
    threads: int,
    election: str = "",
    only: Ranges | None = None,
) -> None:
    """Write the weighted sum of base and rows into ``out``; positions between spans are left.

    Args:
        memory: The arena, ``(bytes,)``, uint8.
        spans: In the order of the flat index.
        weights: ``(K + 1, segments)``, base first; their dtype is that of the sums.
        boundaries: ``(segments + 1,)``.
        out: ``(n,)``, on the device of the arena.
        threads: Number of CPU threads.
        election: How rows are elected instead of summed, or nothing.
        only: Positions that are written, where these are not all; others are left.
    """
    target = as_tensor(out)
    block = CPU_BLOCK if target.device.type == "cpu" else ACCELERATOR_BLOCK
    wide = torch.float64 if weights.dtype == np.float64 else torch.float32
    scratch = torch.empty((2, min(block, target.numel())), dtype=wide, device=target.device)
    columns = weights.T.tolist()
    with torch.no_grad(), torch_threads(threads):
        for piece in pieces(spans, boundaries, only):
            span = spans[piece.span]
            used = [t for t, weight in enumerate(columns[piece.segment]) if weight != 0]
            for start in range(piece.start, piece.stop, block):
                stop = min(start + block, piece.stop)
                values = decode(memory, span, start, stop, used, wide)
                blocks = [(values[t], columns[piece.segment][t]) for t in used]
                if election and len(blocks) > 1:
                    elect_block(blocks, target[start:stop], wide, election)
                else:
                    sum_block(blocks, target[start:stop], scratch[:, : stop - start])


def decode(
    memory: torch.Tensor,
    span: Span,
    start: int,
    stop: int,
    terms: Sequence[int],
    wide: torch.dtype,
) -> dict[int, torch.Tensor]:
    """Decode terms of a span, 0 for the base, at positions ``start:stop``.

    Each is ``(stop - start,)`` of dtype ``wide``; a base that is stored so is a view of the arena.
    """
    low = start - span.start
    high = stop - span.start
    rows = {t: span.rows[t - 1] for t in terms if t > 0}
    result = {}
    base = None
    if 0 in terms or any(column.minus_base for column in rows.values()):
        base = _numbers(memory, span.base, low, high, wide)
    if 0 in terms and base is not None:
        result[0] = base
    count = _sharing(memory, span, low, high, wide) if span.shared and rows else None
    for t, column in rows.items():
        x = _numbers(memory, column, low, high, wide)
        if column.minus_base and base is not None:
            x = x - base
        if column.scale != 1:
            x = x * column.scale
        if column.mask is not None:
            x = torch.where(_kept(memory, column.mask, low, high), x, 0.0)
        result[t] = x if count is None else x / count
    return result


def _numbers(
    memory: torch.Tensor, column: Column, low: int, high: int, wide: torch.dtype
) -> torch.Tensor:
    if column.starts is not None:
        return _packed(memory, column, low, high).to(wide)
    x = _view(memory, column.dtype, column.offset, low, high).to(wide)
    if column.scales is None:
        return x
    first = low // SCALE_BLOCK
    scales = _view(memory, "float32", column.scales, first, -(-high // SCALE_BLOCK)).to(wide)
    skip = low - first * SCALE_BLOCK
    return x * scales.repeat_interleave(SCALE_BLOCK)[skip : skip + high - low]


def _packed(memory: torch.Tensor, column: Column, low: int, high: int) -> torch.Tensor:
    """Elements ``low:high`` of a packed column; those that are not kept are any number of it."""
    block = low // PACK_BLOCK
    before = _view(memory, "int32", column.starts or 0, block, block + 1)
    kept = _kept(memory, column.mask or 0, block * PACK_BLOCK, high)
    if column.count == 0:
        return torch.zeros(high - low, device=memory.device)
    place = kept.cumsum(0, dtype=torch.int32)[low - block * PACK_BLOCK :]
    place.add_(before).sub_(1).clamp_(min=0)  # the last that is kept up to an element
    numbers = _view(memory, column.dtype, column.offset, 0, column.count)
    return numbers.index_select(0, place)


def _view(memory: torch.Tensor, dtype: str, offset: int, low: int, high: int) -> torch.Tensor:
    """Elements ``low:high`` of an array of the arena."""
    size = _DTYPES[dtype].itemsize
    part = memory[offset + low * size : offset + high * size]
    if part.storage_offset() % size:
        part = part.clone()  # torch views bytes as wider numbers only where those are aligned
    return part.view(_DTYPES[dtype])


def _kept(memory: torch.Tensor, mask: int, low: int, high: int) -> torch.Tensor:
    """Bits ``low:high`` of a mask."""
    first = low // 8
    part = memory[mask + first : mask + -(-high // 8)]
    places = torch.arange(8, dtype=torch.uint8, device=memory.device)
    bits = (part[:, None] >> places) & 1
    return bits.flatten()[low - first * 8 : high - first * 8].bool()


def _sharing(
    memory: torch.Tensor, span: Span, low: int, high: int, wide: torch.dtype
) -> torch.Tensor:
    """How many rows keep each position, at least 1."""
    count = torch.zeros(high - low, dtype=wide, device=memory.device)
    for column in span.rows:
        if column.mask is None:
            count += 1
        else:
            count += _kept(memory, column.mask, low, high)
    return count.clamp_(min=1)
