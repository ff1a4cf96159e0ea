"""``dense``: rows as numbers of their own, fp32 (exact) or rounded to bf16 (approximate)."""

from __future__ import annotations

import torch

from mergesearch.merging.kernels.spans import ROW_BITS, ColumnDtype
from mergesearch.merging.resident.encodings.base import (
    EncodedRow,
    EncodedRows,
    Encoding,
    TensorRows,
)
from mergesearch.merging.resident.encodings.packing import StoredColumn


def _encode(tensor: TensorRows) -> EncodedRows:
    """Every row in its own dtype."""
    return EncodedRows(tuple(dense_row(row) for row in tensor.rows))


def dense_row(row: torch.Tensor) -> EncodedRow:
    """A row in its own dtype, fp32 or fp64."""
    dtype: ColumnDtype = "float64" if row.dtype == torch.float64 else "float32"
    return EncodedRow(StoredColumn(dtype), row.reshape(-1))


def _encode_bf16(tensor: TensorRows) -> EncodedRows:
    """Every row rounded to the nearest bf16."""
    return EncodedRows(
        tuple(
            EncodedRow(StoredColumn("bfloat16"), row.reshape(-1).to(torch.bfloat16))
            for row in tensor.rows
        )
    )


DENSE = Encoding("dense", True, "fp32", ROW_BITS["dense"], _encode)
BF16 = Encoding("bf16", False, "rounded to bf16", ROW_BITS["bf16"], _encode_bf16)
