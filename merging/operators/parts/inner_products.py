"""Inner products and norms of tensors of any shape, summed in fp64 without a wide copy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# No larger than what torch sums in one thread, so that the bits do not depend on the number of
# threads.
_CHUNK = 1 << 15


def dot(one: torch.Tensor, other: torch.Tensor) -> float:
    """Σ one · other over all elements, in fp64 and in a fixed order."""
    import torch

    total = torch.zeros((), dtype=torch.float64, device=one.device)
    flat = one.reshape(-1)
    opposite = other.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        total += (flat[chunk].double() * opposite[chunk].double()).sum()
    return float(total)


def products(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float, float]:
    """Σ one², Σ one · other and Σ other², each with the bits of :func:`dot`, in one read."""
    import torch

    totals = torch.zeros(3, dtype=torch.float64, device=one.device)
    flat = one.reshape(-1)
    opposite = other.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        left = flat[start : start + _CHUNK].double()
        right = opposite[start : start + _CHUNK].double()
        parts = (left * left).sum(), (left * right).sum(), (right * right).sum()
        totals += torch.stack(parts)
    own, mixed, opposed = totals.tolist()
    return own, mixed, opposed


def norm(tensor: torch.Tensor) -> float:
    """Frobenius norm, summed in fp64."""
    return math.sqrt(dot(tensor, tensor))


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Cosine of the angle between two tensors, within [−1, 1]; 0 if one of them is zero."""
    length = norm(one) * norm(other)
    return min(max(dot(one, other) / length, -1.0), 1.0) if length > 0 else 0.0
