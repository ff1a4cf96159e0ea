"""Counts of numbers by digits of their bits, on an accelerator: integers, the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.tensors.place import Place

DIGIT = 16
BINS = 1 << DIGIT

#: Bytes that counting needs for each byte of the numbers: keys of 64 bits, shifted and compared.
COPIES = 10


def digit_counts(
    tensor: torch.Tensor,
    bits: int,
    signed: bool,
    shift: int,
    prefix: int | None,
    place: Place,
) -> npt.NDArray[np.int64]:
    """Counts ``(65536,)`` by the 16 bits of the numbers' keys from ``shift`` on.

    Args:
        tensor: Of any shape and device; counted in pieces that the place allows.
        bits: Width of the keys, 32 or 64.
        signed: Whether keys are ordered by value, not by magnitude.
        shift: Bits below the digit.
        prefix: Bits above the digit of the numbers that count; None for all.
        place: Where to count, unless the tensor lies on an accelerator. The counts themselves, half
            a megabyte, lie beside what it allows.
    """
    import torch

    total = np.zeros(BINS, dtype=np.int64)
    wide = torch.float32 if bits == 32 else torch.float64
    with place.turn:
        for piece in place.pieces(tensor, COPIES):
            above = _bits_above(piece.to(wide), signed)
            digits = above(shift)
            if prefix is not None:
                digits = digits[above(shift + DIGIT) == prefix]
            counts = torch.bincount(digits & (BINS - 1), minlength=BINS)
            total += counts.cpu().numpy()
    return total


def _bits_above(numbers: torch.Tensor, signed: bool) -> Callable[[int], torch.Tensor]:
    """``shift -> key >> shift`` for unsigned keys in the order of the numbers, as int64.

    Of a whole key of 64 bits the uppermost is wrong, which no digit but the first tells.
    """
    import torch

    bits = 8 * numbers.element_size()
    most = (1 << (bits - 1)) - 1
    stored = numbers.view(torch.int32 if bits == 32 else torch.int64)
    # By value: the order of negative numbers is reversed, and they come below positive ones.
    keys = (stored ^ ((stored >> (bits - 1)) & most) if signed else stored & most).long()

    def above(shift: int) -> torch.Tensor:
        lifted = 1 << (bits - 1 - shift) if signed and shift else 0
        return (keys >> shift) + lifted

    return above
