"""The blocks of ggml's Q4_K: four bits an element, with scales and minima of six bits.

Written from the layout that ``gguf.quants.Q4_K`` reads; the package itself writes no such blocks.
256 elements share two fp16 numbers, each 32 of them a scale and a minimum. These come from the
least and the greatest element; llama.cpp tries some twenty scales for each 32 elements and takes
the best, so that its files lie a little closer to the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

#: Elements of a block.
BLOCK = 256
#: Elements that share a scale.
GROUP = 32

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def quantised(array: npt.NDArray[Any]) -> Bytes:
    """The blocks ``(..., n / 256 * 144)`` of rows ``(..., n)``; n is a multiple of 256.

    A block is ``d, d_min`` (fp16), 12 bytes of scales, 128 bytes of elements; an element is
    ``d · scale · q − d_min · minimum``.
    """
    groups = np.ascontiguousarray(array, np.float32).reshape(-1, BLOCK // GROUP, GROUP)
    minima = np.maximum(-groups.min(axis=-1), 0)  # of what is subtracted
    scales = (groups.max(axis=-1) + minima) / 15
    d, scale_numbers = _six_bits(scales)
    d_min, minimum_numbers = _six_bits(minima)
    step = _wide(d) * scale_numbers
    offset = _wide(d_min) * minimum_numbers
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    numbers = np.rint((groups + offset[..., None]) * inverse[..., None]).clip(0, 15)
    pairs = numbers.astype(np.uint8).reshape(-1, BLOCK // (2 * GROUP), 2, GROUP)
    elements = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(groups), -1)
    packed = _packed(scale_numbers.astype(np.uint8), minimum_numbers.astype(np.uint8))
    blocks = np.concatenate([d.view(np.uint8), d_min.view(np.uint8), packed, elements], axis=1)
    return blocks.reshape(*array.shape[:-1], -1)


def _six_bits(values: Floats) -> tuple[npt.NDArray[np.float16], Floats]:
    """One fp16 number a block ``(blocks, 1)``, and multiples of it up to 63 ``(blocks, 8)``."""
    unit = (values.max(axis=-1, keepdims=True) / 63).astype(np.float16)
    wide = _wide(unit)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide > 0)
    return unit, np.rint(values * inverse).clip(0, 63).astype(np.float32)


def _wide(unit: npt.NDArray[np.float16]) -> Floats:
    return unit.astype(np.float32)


def _packed(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight scales and eight minima of six bits in twelve bytes ``(blocks, 12)``."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    third = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)
