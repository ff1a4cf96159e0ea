"""Whether numbers of a merge are finite, compiled by numba: some ranges of a long array.

A sum in torch would take a call for each of thousands of ranges. The bits of a number that is not
finite have all bits of the exponent set, whatever its width.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import types

from mergesearch.merging.kernels.numba_kernel import compiled
from mergesearch.merging.kernels.spans import Ranges
from mergesearch.merging.kernels.spans_numba import even_shares

#: dtype -> that of its bits, and the bits of the exponent.
_BITS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
_INTEGERS = (types.int16, types.int32, types.int64)
_RANGES = types.Array(types.int64, 2, "C", readonly=True)


@compiled([types.boolean(types.Array(own, 1, "C"), own) for own in _INTEGERS])
def _holds_exponent(bits: Any, exponent: Any) -> bool:
    """Whether some number has all bits of the exponent set; without a branch, for vectors."""
    found = exponent ^ exponent
    for i in range(bits.size):
        found |= (bits[i] & exponent) == exponent
    return found != 0  # type: ignore[no-any-return]


@compiled([types.boolean(types.Array(own, 1, "C"), _RANGES, own) for own in _INTEGERS], nogil=True)
def _any_holds_exponent(bits: Any, ranges: Any, exponent: Any) -> bool:
    for row in range(ranges.shape[0]):
        if _holds_exponent(bits[ranges[row, 0] : ranges[row, 1]], exponent):
            return True
    return False


def finite_in(numbers: torch.Tensor, ranges: Ranges, threads: int = 1) -> bool:
    """Whether all numbers in some ranges of an array in main memory are finite.

    Args:
        numbers: ``(n,)``, contiguous.
        ranges: Of its positions.
        threads: CPU threads.
    """
    integers, exponent = _BITS[numbers.dtype]
    bits = numbers.view(integers).numpy()
    mask = bits.dtype.type(exponent)

    def odd(share: tuple[int, int]) -> bool:
        return bool(_any_holds_exponent(bits, np.clip(ranges, *share), mask))

    shares = even_shares(ranges, len(bits), threads)
    if len(shares) == 1:
        return not odd(shares[0])
    with ThreadPoolExecutor(threads) as pool:
        return not any(list(pool.map(odd, shares)))
