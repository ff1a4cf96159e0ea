"""What an encoding is: how many bits an element takes, and how a tensor's rows become columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergesearch.merging.resident.encodings.packing import StoredColumn

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class TensorRows:
    """The rows of one tensor, and what they were prepared from.

    Attributes:
        base: The base as stored, any shape.
        experts: The experts as stored, of the same shape; fewer than rows, or other tensors than
            the rows were made from, where they are of no use.
        rows: K rows, in fp32 (fp64 where a source is fp64).
        relative: Whether rows are added to the base, rather than interpolated with it.
    """

    base: torch.Tensor
    experts: Sequence[torch.Tensor]
    rows: Sequence[torch.Tensor]
    relative: bool


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """One row as it is stored.

    Attributes:
        column: How.
        numbers: ``(n,)`` in the dtype of the column; of kept elements only where it is packed.
        mask: Packed bits, uint8 ``(ceil(n / 8),)``, or None.
        scales: fp32 ``(ceil(n / 128),)``, or None.
        starts: int32 ``(ceil(n / 64),)``, or None.
    """

    column: StoredColumn
    numbers: torch.Tensor
    mask: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """What it takes, without the padding of its parts."""
        parts = (self.numbers, self.mask, self.scales, self.starts)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """All rows of a tensor as they are stored.

    Attributes:
        rows: K rows.
        shared: Whether each is divided by the number of rows that keep a position.
    """

    rows: tuple[EncodedRow, ...]
    shared: bool = False

    @property
    def bytes(self) -> int:
        """What all rows take."""
        return sum(row.bytes for row in self.rows)


@dataclass(frozen=True)
class Encoding:
    """A form in which rows are kept.

    Attributes:
        name: In study files, reports and plans.
        exact: Whether decoded rows have the bits of fp32 rows.
        summary: One line for listings.
        bits: dtype of the expert, share of elements that a row keeps -> bits that an element takes.
        encode: The rows as they are stored, or None where the encoding cannot express them.
    """

    name: str
    exact: bool
    summary: str
    bits: Callable[[str, float], float]
    encode: Callable[[TensorRows], EncodedRows | None]
