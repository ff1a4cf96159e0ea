"""``int8``: 8 bits an element and one fp32 scale for 128 elements; approximate.

A block's scale is its largest magnitude over 127, as in Dettmers 2022, "8-bit optimizers via
block-wise quantization", with an even grid.
"""

from __future__ import annotations

import torch

from mergesearch.merging.kernels.spans import ROW_BITS, SCALE_BLOCK
from mergesearch.merging.resident.encodings.base import (
    EncodedRow,
    EncodedRows,
    Encoding,
    TensorRows,
)
from mergesearch.merging.resident.encodings.packing import StoredColumn, scale_count


def _encode(tensor: TensorRows) -> EncodedRows | None:
    """Every row in blocks of 128; None for experts that are interpolated, whose base is not 0."""
    if not tensor.relative or tensor.rows[0].dtype != torch.float32:
        return None
    return EncodedRows(tuple(quantized(row.reshape(-1)) for row in tensor.rows))


def quantized(row: torch.Tensor) -> EncodedRow:
    """An fp32 row ``(n,)`` as int8 numbers and scales: ``x ≈ q · s``."""
    blocks = scale_count(row.numel())
    padded = torch.zeros(blocks * SCALE_BLOCK, dtype=torch.float32)
    padded[: row.numel()] = row
    grid = padded.view(blocks, SCALE_BLOCK)
    scales = grid.abs().amax(dim=1) / 127  # s = max |x| / 127
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales))
    numbers = (grid / divisor[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return EncodedRow(
        StoredColumn("int8"), numbers.view(-1)[: row.numel()].contiguous(), scales=scales
    )


INT8 = Encoding(
    "int8",
    False,
    "8 bits, one fp32 scale for 128 elements",
    ROW_BITS["int8"],
    _encode,
)
