"""Random masks that depend on a seed, names and positions alone, not on a generator's state.

Element i of a tensor of an expert always meets the same 32 random bits, whatever the order of
tensors, chunks, shards, experts, devices and dtypes: the bits are Philox (Salmon 2011, "Parallel
random numbers: as easy as 1, 2, 3") keyed by the seed and the two names, with i as the counter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

#: 32-bit numbers per step of the counter: Philox 4x64 gives four of 64 bits.
PER_STEP = 8

#: Elements drawn at a time, a multiple of ``PER_STEP``.
BLOCK = 1 << 18


def uniform_bits(
    seed: int, expert: str, tensor: str, start: int, stop: int
) -> npt.NDArray[np.uint32]:
    """Random bits of the elements ``start:stop``, ``(stop - start,)``.

    They are the same for every way to cut a range.
    """
    key = hashlib.sha256(json.dumps([seed, expert, tensor]).encode()).digest()[:16]
    first = start // PER_STEP
    steps = -(-stop // PER_STEP) - first
    generator = np.random.Philox(key=int.from_bytes(key, "little"), counter=first)
    bits = generator.random_raw(steps * PER_STEP // 2).astype("<u8", copy=False).view("<u4")
    return bits[start - first * PER_STEP : stop - first * PER_STEP].astype(np.uint32, copy=False)


def keep_mask(
    seed: int, expert: str, tensor: str, shape: Sequence[int], probability: float | torch.Tensor
) -> torch.Tensor:
    """True where an element is kept, boolean of ``shape``, in main memory.

    Args:
        seed: Chooses among masks.
        expert: Name of the expert.
        tensor: Name of the tensor.
        shape: Of the tensor.
        probability: Of keeping, for all elements or for each, of ``shape``; 1 keeps every time, 0
            never.
    """
    import torch

    mask = torch.empty(tuple(shape), dtype=torch.bool)
    flat = mask.view(-1)
    each = (
        probability.detach().cpu().double().reshape(-1)
        if isinstance(probability, torch.Tensor)
        else None
    )
    for start in range(0, flat.numel(), BLOCK):
        stop = min(start + BLOCK, flat.numel())
        # Signed 64 bits: 2^32, the limit of probability 1, has to fit.
        bits = torch.from_numpy(uniform_bits(seed, expert, tensor, start, stop).astype(np.int64))
        limits = (
            torch.tensor(float(probability), dtype=torch.float64)
            if each is None
            else each[start:stop]
        )
        flat[start:stop] = bits < torch.round(limits * 2.0**32).long()
    return mask
