"""Task vectors, tensor by tensor: what nearly every operator starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merging.operators.base import TensorSource

if TYPE_CHECKING:
    import torch


def task_vectors(base: TensorSource, experts: Sequence[TensorSource], name: str) -> list[torch.Tensor]:
    """``expert − base`` of one tensor for every expert, new tensors in fp32 (fp64 where a source is fp64)."""
    origin = base.read(name)
    return [difference(expert.read(name), origin) for expert in experts]


def difference(tensor: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
    """``tensor − origin`` as a new tensor on the device of ``origin``, in fp32 (fp64 if either is fp64)."""
    import torch

    wide = torch.float64 if torch.float64 in (tensor.dtype, origin.dtype) else torch.float32
    return tensor.to(origin.device, wide) - origin.to(wide)
