"""parameter_views."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


def _held_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every distinct floating parameter and stored buffer of the model."""
    seen: set[object] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.numel() and _memory(tensor) not in seen:
            seen.add(_memory(tensor))
            yield name, tensor


def _memory(tensor: torch.Tensor) -> object:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _as_stored(model: nn.Module, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored name -> the memory of the model that ``save_pretrained`` would write under it,
    wherever there is one.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, torch.Tensor] = model.state_dict()
    if not isinstance(model, PreTrainedModel):
        return state
    stored = dict(revert_weight_conversion(model, state))
    renamed = {_memory(tensor) for tensor in stored.values()}
    for name, tensor in held.items():
        if _memory(tensor) not in renamed:
            numbers = torch.arange(tensor.numel()).view(tensor.shape)
            for key, elements in revert_weight_conversion(model, {name: numbers}).items():
                part = _part(tensor.detach(), elements)
                if part is not None:
                    stored[key] = part
    return stored


@dataclass(frozen=True)
class ParameterView:
    """Where a stored tensor lies in a model: a whole parameter or buffer, or evenly spaced elements
    of one.

    Attributes:
        parameter: Name in the model of the parameter or buffer.
        shape: Shape of the stored tensor.
        stride: Its strides within the parameter, in elements.
        offset: Its first element within the parameter.
    """

    parameter: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, like: torch.Tensor) -> torch.Tensor:
        """The stored tensor's part, as a view, of a tensor laid out as the parameter: weights,
        gradients.
        """
        return like.as_strided(self.shape, self.stride, like.storage_offset() + self.offset)


def parameter_views(model: nn.Module, *, as_saved: bool = True) -> dict[str, ParameterView]:
    """Stored name -> place in the model, for every floating tensor that is no copy.

    Args:
        model: Any module.
        as_saved: By the names under which ``save_pretrained`` writes; otherwise by those of
            ``state_dict``.
    """
    held = dict(_held_tensors(model))
    owners = sorted((tensor.data_ptr(), name) for name, tensor in held.items())
    stored = _as_stored(model, held) if as_saved else model.state_dict()
    places = {}
    for name, tensor in stored.items():
        owner = (
            _owner(tensor, held, owners) if tensor.is_floating_point() and tensor.numel() else None
        )
        if owner is not None:
            places[name] = _place_of(tensor, owner, held[owner])
    return places


def _place_of(tensor: torch.Tensor, name: str, owner: torch.Tensor) -> ParameterView:
    """Where a stored tensor lies within the parameter ``owner`` of this name."""
    offset = (tensor.data_ptr() - owner.data_ptr()) // tensor.itemsize
    return ParameterView(name, tuple(tensor.shape), tuple(tensor.stride()), offset)


def _part(tensor: torch.Tensor, elements: torch.Tensor) -> torch.Tensor | None:
    """The view of a contiguous ``tensor`` that holds the elements of these numbers, if they are
    evenly spaced.
    """
    first = int(elements.flatten()[0])
    strides = []
    expected = torch.tensor(first)
    for dim, size in enumerate(elements.shape):
        stride = int(elements.select(dim, 1).flatten()[0]) - first if size > 1 else 0
        steps = torch.arange(size) * stride
        expected = expected.unsqueeze(-1) + steps
        strides.append(stride)
    if not torch.equal(expected.view(elements.shape), elements):
        return None
    return tensor.as_strided(elements.shape, strides, tensor.storage_offset() + first)


def _owner(
    place: torch.Tensor, held: Mapping[str, torch.Tensor], owners: Sequence[tuple[int, str]]
) -> str | None:
    """Name of the parameter that ``place`` is or is a part of, None for a copy; ``owners`` are
    sorted by address.
    """
    at = bisect_right(owners, place.data_ptr(), key=lambda owner: owner[0]) - 1
    if at < 0:
        return None
    start, name = owners[at]
    return name if place.data_ptr() < start + held[name].nbytes else None
