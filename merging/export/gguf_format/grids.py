"""Matrices that were rounded to bits of their own, as blocks of GGUF that hold the same values.

Groups of a row share a scale and a zero (:mod:`mergesearch.merging.models.layer_bits`), so that the
values of a block of 32 lie on a grid. ``q4_1`` and ``q5_1`` have a step and a minimum for each
block, and can hold that grid; their usual encoding, from the range of a block, would miss it where
the block does not reach both ends.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

#: Elements of a block.
BLOCK = 32
#: Type -> bits of a code.
CODES = {"q4_1": 4, "q5_1": 5}
#: Share of a block's range by which values may miss a grid that is taken for theirs.
EXACT = 1e-4


def type_of(bits: int) -> str:
    """The narrowest type for matrices of so many bits; above five they are rounded again."""
    if bits > max(CODES.values()):
        return "q8_0"
    return next(kind for kind, width in CODES.items() if bits <= width)


def on_grid(array: npt.NDArray[np.float32], kind: str) -> Bytes:
    """The blocks of a matrix whose values lie on grids, ``(rows, bytes)``.

    Args:
        array: ``(rows, columns)``; columns are a multiple of 32.
        kind: One of :data:`CODES`.
    """
    width = CODES[kind]
    blocks = array.reshape(-1, BLOCK).astype(np.float64)
    low = blocks.min(axis=1, keepdims=True)
    span = blocks.max(axis=1, keepdims=True) - low
    levels = _levels(blocks - low, span, 2**width - 1)
    step = span / levels
    codes = np.rint((blocks - low) / np.where(step > 0, step, 1.0)).astype(np.uint8)
    ends = np.concatenate([step, low], axis=1).astype(np.float16)
    halves = codes.reshape(-1, 2, BLOCK // 2)
    parts = [ends.view(np.uint8)]
    if width > 4:
        parts.append(np.packbits(codes >> 4, axis=1, bitorder="little"))
    parts.append(halves[:, 0] & 15 | halves[:, 1] << 4)
    return np.concatenate(parts, axis=1).reshape(len(array), -1)


def _levels(shifted: Blocks, span: Blocks, most: int) -> Blocks:
    """Steps between the ends of each block under which its values miss a grid least ``(n, 1)``."""
    found = np.ones(len(shifted))
    missed = np.full(len(shifted), np.inf)
    left = np.flatnonzero(span[:, 0])
    for levels in range(most, 0, -1):
        places = shifted[left] * (levels / span[left])
        off = np.abs(places - np.rint(places)).max(axis=1, initial=0) / levels
        better = off < missed[left]
        found[left[better]] = levels
        missed[left[better]] = off[better]
        left = left[missed[left] > EXACT]
    return found[:, None]
