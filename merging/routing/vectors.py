"""Tensors of models, and the low-rank vectors that experts have beyond a shared merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mergesearch.merging.models.own_heads import OwnHeads
from mergesearch.merging.models.task_heads import TaskHead, wide

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class LowRank:
    """A tensor as ``left @ right``, reshaped.

    ``right`` is None for one that is kept whole in ``left``.
    """

    left: torch.Tensor
    right: torch.Tensor | None
    shape: tuple[int, ...]

    def dense(self) -> torch.Tensor:
        """The tensor itself."""
        return self.left if self.right is None else (self.left @ self.right).view(self.shape)


def floating_tensors(model: nn.Module) -> Tensors:
    """Name -> the memory of every distinct floating parameter and stored buffer of a model."""
    seen: set[object] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.is_floating_point() and tensor.numel() and memory not in seen:
            seen.add(memory)
            tensors[name] = tensor
    return tensors


def copied_tensors(model: nn.Module) -> Tensors:
    """Copies of :func:`floating_tensors`, as they are now."""
    return {name: tensor.detach().clone() for name, tensor in floating_tensors(model).items()}


def without_heads(tensors: Tensors, head: TaskHead) -> Tensors:
    """The tensors that are merged, where experts have heads of their own."""
    private = head.private if isinstance(head, OwnHeads) else ()
    return {name: tensor for name, tensor in tensors.items() if name not in private}


def exclusive_vector(
    expert: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], rank: float
) -> Any:
    """Name -> low-rank difference of an expert from the shared merge.

    Matrices (and kernels, seen as matrices of one row per output) keep the share ``rank`` of their
    singular values, at least one; vectors and scalars stay whole.
    """
    return {
        name: low_rank(wide(tensor) - wide(shared[name]), rank) for name, tensor in expert.items()
    }


def low_rank(tensor: torch.Tensor, rank: float) -> LowRank:
    """The tensor with the share ``rank`` of its greatest singular values, at least one."""
    if tensor.ndim < 2:
        return LowRank(tensor, None, tuple(tensor.shape))
    left, values, right = torch.linalg.svd(tensor.reshape(tensor.shape[0], -1), full_matrices=False)
    kept = max(1, round(rank * len(values)))
    return LowRank(
        (left[:, :kept] * values[:kept]).contiguous(),
        right[:kept].contiguous(),
        tuple(tensor.shape),
    )
