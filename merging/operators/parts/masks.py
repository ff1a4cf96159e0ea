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
    from mergesearch.merging.kernels.chunks.draws import draw_bits

    first = start // PER_STEP
    bits = draw_bits(mask_key(seed, expert, tensor), first, stop - first * PER_STEP)
    return bits[start - first * PER_STEP :]


def mask_key(seed: int, expert: str, tensor: str) -> int:
    """The 128 bits of the key of a mask."""
    key = hashlib.sha256(json.dumps([seed, expert, tensor]).encode()).digest()[:16]
    return int.from_bytes(key, "little")


def chance_of(probability: float) -> int:
    """The number below which an element's bits lie with this probability, 0 to 2³²."""
    return round(float(probability) * 2.0**32)


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

    if not isinstance(probability, torch.Tensor):
        return _equal_mask(mask_key(seed, expert, tensor), shape, chance_of(probability))
    mask = torch.empty(tuple(shape), dtype=torch.bool)
    flat = mask.view(-1)
    each = probability.detach().cpu().double().reshape(-1)
    for start in range(0, flat.numel(), BLOCK):
        stop = min(start + BLOCK, flat.numel())
        # Signed 64 bits: 2^32, the limit of probability 1, has to fit.
        bits = torch.from_numpy(uniform_bits(seed, expert, tensor, start, stop).astype(np.int64))
        flat[start:stop] = bits < torch.round(each[start:stop] * 2.0**32).long()
    return mask


def _equal_mask(key: int, shape: Sequence[int], chance: int) -> torch.Tensor:
    """The mask of one chance for all elements."""
    import torch

    from mergesearch.merging.kernels.chunks.draws import draw_mask

    if chance >= 1 << 32:
        return torch.ones(tuple(shape), dtype=torch.bool)
    mask = torch.empty(tuple(shape), dtype=torch.bool)
    draw_mask(key, chance, mask.view(-1).view(torch.uint8).numpy())
    return mask
