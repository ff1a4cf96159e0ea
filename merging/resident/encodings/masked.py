"""``masked``: the stored expert, one bit an element, a scale for the tensor.

What TIES, DARE, Breadcrumbs, EMR and Consensus leave of a task vector is the task vector itself at
some elements, times a factor, divided by the number of experts that agree at the position where the
mean of those is merged. The factor is not asked for but found: it is the one fp32 number that gives
every bit of the row, and where there is none the row is kept in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mergesearch.merging.kernels.spans import ROW_BITS
from mergesearch.merging.resident.encodings.base import (
    EncodedRow,
    EncodedRows,
    Encoding,
    TensorRows,
)
from mergesearch.merging.resident.encodings.packing import StoredColumn
from mergesearch.merging.resident.encodings.stored import HALVES, STORED, fitting_scale


def _encode(tensor: TensorRows) -> EncodedRows | None:
    """Rows that are masked task vectors; None unless all of them are."""
    whole = STORED.encode(tensor)
    if whole is not None:
        return whole
    fits = len(tensor.experts) == len(tensor.rows) and tensor.relative
    if not fits or tensor.rows[0].dtype != torch.float32 or tensor.base.dtype == torch.float64:
        return None
    if any(expert.dtype not in HALVES for expert in tensor.experts):
        return None
    kept = [row != 0 for row in tensor.rows]
    for shared in (False, True):
        rows = _rows(tensor, kept, shared)
        if rows is not None:
            return EncodedRows(tuple(rows), shared)
    return None


def _rows(
    tensor: TensorRows, kept: Sequence[torch.Tensor], shared: bool
) -> list[EncodedRow] | None:
    """Every row as a mask and a factor, None if one is no such."""
    origin = tensor.base.to(torch.float32)
    count = None
    if shared:
        count = torch.stack(list(kept)).sum(dim=0).clamp_(min=1).to(torch.float32)
    rows = []
    for expert, row, mask in zip(tensor.experts, tensor.rows, kept, strict=True):
        scale = fitting_scale(expert.to(torch.float32) - origin, row, mask, count)
        if scale is None:
            return None
        column = StoredColumn(HALVES[expert.dtype], minus_base=True, scale=scale, masked=True)
        rows.append(EncodedRow(column, expert.reshape(-1), packed_bits(mask)))
    return rows


def packed_bits(mask: torch.Tensor) -> torch.Tensor:
    """Bits of a mask, bit ``i % 8`` of byte ``i // 8`` for element i: uint8."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


MASKED = Encoding(
    "masked",
    True,
    "the expert as its checkpoint has it, one bit an element, a scale",
    ROW_BITS["masked"],
    _encode,
)
