"""``packed``: of the stored expert only what a mask keeps, one number after the other.

As ``masked``, without the numbers that the mask leaves out. One start for every block of 64
elements says how many numbers come before it, so that a kernel finds those of any block by itself.
Rows that are no multiples of a task vector in 16 bits, as those of fp32 experts, are packed as they
are. Either way a tensor is packed only where that takes less room.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mergesearch.merging.kernels.spans import PACK_BLOCK, ROW_BITS
from mergesearch.merging.resident.encodings.base import (
    EncodedRow,
    EncodedRows,
    Encoding,
    TensorRows,
)
from mergesearch.merging.resident.encodings.dense import DENSE
from mergesearch.merging.resident.encodings.masked import MASKED, packed_bits
from mergesearch.merging.resident.encodings.packing import StoredColumn, start_count

#: Numbers of a row that starts, which are int32, can count.
MOST_NUMBERS = 2**31 - 1


def _encode(tensor: TensorRows) -> EncodedRows | None:
    """Rows without what their masks leave out, or the masked ones where these take less."""
    whole = MASKED.encode(tensor) or DENSE.encode(tensor)
    if whole is None or tensor.rows[0].dtype != torch.float32:
        return whole
    pairs = zip(whole.rows, tensor.rows, strict=True)
    rows = EncodedRows(tuple(_packed(encoded, row) for encoded, row in pairs), whole.shared)
    return min(whole, rows, key=lambda one: one.bytes)


def _packed(encoded: EncodedRow, row: torch.Tensor) -> EncodedRow:
    """A row without the numbers of elements that its mask leaves out.

    A row in fp32 gets a mask, of its elements other than 0; an unmasked expert stays as it is.
    """
    flat = row.reshape(-1)
    # The mask was made of numbers other than 0; of a row as it is, -0 is kept too.
    kept = flat.view(torch.int32) != 0 if encoded.mask is None else flat != 0
    whole = encoded.mask is None and encoded.column != StoredColumn("float32")
    if whole or row.numel() > MOST_NUMBERS:
        return encoded
    numbers = encoded.numbers[kept]
    column = replace(encoded.column, masked=True, packed=numbers.numel())
    return EncodedRow(column, numbers, packed_bits(kept), starts=starts_of(kept))


def starts_of(kept: torch.Tensor) -> torch.Tensor:
    """How many elements are kept before each block of 64: int32 ``(ceil(n / 64),)``."""
    blocks = torch.zeros(start_count(kept.numel()) * PACK_BLOCK, dtype=torch.bool)
    blocks[: kept.numel()] = kept
    counts = blocks.view(-1, PACK_BLOCK).sum(dim=1, dtype=torch.int32)
    return counts.cumsum(0, dtype=torch.int32) - counts


PACKED = Encoding(
    "packed",
    True,
    "what a mask keeps of the expert as its checkpoint has it, one bit an element, a scale",
    ROW_BITS["packed"],
    _encode,
)
