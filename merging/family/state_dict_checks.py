"""What state dicts must have in common to be merged, and which of their tensors are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.policies import TensorPolicies

StateDict = Mapping[str, torch.Tensor]


def kept_names(base: StateDict, policies: TensorPolicies) -> dict[str, str]:
    """Every name of the base -> the name under which its memory is merged."""
    return {name: name for name in base} if policies.tied == "untie" else _tied_names(base)


def dtype_name(tensor: torch.Tensor) -> str:
    """Name of a tensor's dtype, as layouts have it."""
    return str(tensor.dtype).removeprefix("torch.")


def is_merged(tensor: torch.Tensor) -> bool:
    """Whether a tensor is merged rather than copied from the base."""
    # Complex and 8-bit floats count, so that the layout refuses them rather than copying them
    # silently.
    return tensor.is_floating_point() or tensor.is_complex()


def check_expert(label: str, state: StateDict, base: StateDict, kept: Mapping[str, str]) -> None:
    """Refuse an expert that has not the base's tensors.

    Raises:
        CheckpointError: If its names, shapes, kinds or ties are others.
    """
    missing = sorted(set(base) - set(state))
    extra = sorted(set(state) - set(base))
    if missing or extra:
        raise CheckpointError(
            f"expert {label}: expected the names of the base, missing {missing}, extra {extra}; "
            "merge models of one architecture"
        )
    for name, tensor in base.items():
        other = state[name]
        if other.shape != tensor.shape or is_merged(other) != is_merged(tensor):
            ours, theirs = (f"{dtype_name(t)} {tuple(t.shape)}" for t in (tensor, other))
            raise CheckpointError(
                f"expert {label}: tensor {name!r}: expected {ours} as in the base, received "
                f"{theirs}"
            )
        if kept[name] != name and not _same_values(other, state[kept[name]]):
            raise CheckpointError(
                f"expert {label}: expected {name!r} equal to {kept[name]!r}, tied in the base, "
                "received other values; untie them in the base (clone) to merge them apart"
            )


def _tied_names(state: StateDict) -> dict[str, str]:
    """Every name -> the first name of the same memory seen in the same way."""
    first: dict[object, str] = {}
    return {name: first.setdefault(_memory(name, tensor), name) for name, tensor in state.items()}


def _memory(name: str, tensor: torch.Tensor) -> object:
    if tensor.numel() == 0:
        return name  # empty tensors all lie at address 0
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)
