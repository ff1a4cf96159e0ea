"""``stored``: the expert as its checkpoint has it; kernels take the base from it.

The difference of two stored numbers, formed in fp32, is what a task vector in fp32 holds, so that
nothing is lost and a bf16 row takes two bytes an element rather than four.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mergesearch.merging.kernels.spans import ROW_BITS, ColumnDtype
from mergesearch.merging.resident.encodings.base import (
    EncodedRow,
    EncodedRows,
    Encoding,
    TensorRows,
)
from mergesearch.merging.resident.encodings.dense import dense_row
from mergesearch.merging.resident.encodings.packing import StoredColumn

#: Elements from which the factor of a row is estimated.
SAMPLE = 4096

#: dtypes of 16 bits, in which a checkpoint may hold an expert.
HALVES: dict[torch.dtype, ColumnDtype] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _encode(tensor: TensorRows) -> EncodedRows | None:
    """Rows that are experts, or multiples of their differences to the base.

    None unless all of them are.
    """
    if tensor.rows[0].dtype != torch.float32:
        return None
    rows: list[EncodedRow | None] = []
    if not tensor.relative:
        rows = [_whole(tensor.experts, row) for row in tensor.rows]
    elif len(tensor.experts) == len(tensor.rows):
        pairs = zip(tensor.experts, tensor.rows, strict=True)
        rows = [_difference(tensor.base, expert, row) for expert, row in pairs]
    complete = tuple(row for row in rows if row is not None)
    return EncodedRows(complete) if complete and len(complete) == len(rows) else None


def _difference(base: torch.Tensor, expert: torch.Tensor, row: torch.Tensor) -> EncodedRow | None:
    """The expert, if the row is a multiple of its difference to the base."""
    dtype = HALVES.get(expert.dtype)
    if dtype is None:  # it would take no less room than the row
        return dense_row(row) if expert.dtype == torch.float32 else None
    change = expert.to(torch.float32) - base.to(torch.float32)
    scale = fitting_scale(change, row)
    if scale is None:
        return None
    return EncodedRow(StoredColumn(dtype, minus_base=True, scale=scale), expert.reshape(-1))


def _whole(experts: Sequence[torch.Tensor], row: torch.Tensor) -> EncodedRow | None:
    """The row in the 16 bits of the experts, if it has no more."""
    dtypes = {expert.dtype for expert in experts}
    dtype = HALVES.get(dtypes.pop()) if len(dtypes) == 1 else None
    if dtype is None:
        return None
    narrow = row.to(experts[0].dtype)
    if not equal_bits(narrow.to(torch.float32), row):
        return None
    return EncodedRow(StoredColumn(dtype), narrow.reshape(-1))


def fitting_scale(
    change: torch.Tensor,
    row: torch.Tensor,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> float | None:
    """The fp32 factor that makes the row of a task vector, bit for bit, or None.

    Args:
        change: The task vector τ, fp32.
        row: ``mask · (τ · factor) / count``, fp32, of the same shape.
        mask: Boolean, or None for all elements.
        count: fp32, or None for 1.
    """
    for scale in _candidates(change, row, count):
        if equal_bits(decoded(change, scale, mask, count), row):
            return scale
    return None


def decoded(
    change: torch.Tensor, scale: float, mask: torch.Tensor | None, count: torch.Tensor | None
) -> torch.Tensor:
    """What a kernel makes of a task vector, operation by operation."""
    row = change if scale == 1 else change * scale
    if mask is not None:
        row = torch.where(mask, row, torch.zeros((), dtype=torch.float32))
    return row if count is None else row / count


def _candidates(change: torch.Tensor, row: torch.Tensor, count: torch.Tensor | None) -> list[float]:
    """1, and the fp32 numbers nearest to the ratio of row and task vector."""
    positions = (row.reshape(-1) != 0).nonzero()[:SAMPLE, 0]
    if positions.numel() == 0:
        return [1.0]
    given = row.reshape(-1)[positions].double()
    if count is not None:
        given = given * count.reshape(-1)[positions].double()
    ratio = np.float32(float((given / change.reshape(-1)[positions].double()).median()))
    if not np.isfinite(ratio):
        return [1.0]
    near = [ratio, np.nextafter(ratio, np.float32(np.inf)), np.nextafter(ratio, np.float32(0))]
    return [1.0, *(float(number) for number in near)]


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two fp32 tensors of one shape hold the same bits."""
    first = one.contiguous().view(torch.int32)
    return torch.equal(first, other.contiguous().view(torch.int32))


STORED = Encoding(
    "stored",
    True,
    "the expert as its checkpoint has it",
    ROW_BITS["stored"],
    _encode,
)
