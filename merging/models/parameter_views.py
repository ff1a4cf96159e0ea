"""Where stored tensors lie in a model that transformers holds in memory.

Names and shapes differ between the two: transformers renames parameters when it loads a checkpoint
and fuses some. The map is taken from transformers itself, by asking how it would save the model and
seeing which memory each stored name then points to. Where saving copies (experts of a mixture,
fused in memory), it is asked once more, about element numbers instead of weights.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ParameterView:
    """Where a stored tensor lies in a model.

    It is a whole parameter or buffer, or evenly spaced elements of one.

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
        """The stored tensor's part, as a view, of a tensor that is laid out as the parameter.

        Args:
            like: The parameter's weights, or its gradient.
        """
        return like.as_strided(self.shape, self.stride, like.storage_offset() + self.offset)


@dataclass(frozen=True, eq=False)
class StoredTensors:
    """The tensors of a model under their stored names.

    Attributes:
        held: Name in the model -> every distinct floating parameter and stored buffer.
        by_name: Stored name -> the model's memory of the tensor, or a copy where there is none.
        starts: Address and name of each of ``held``, in increasing order.
    """

    held: Mapping[str, torch.Tensor]
    by_name: Mapping[str, torch.Tensor]
    starts: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, model: nn.Module, *, as_saved: bool = True) -> StoredTensors:
        """The tensors of a model, by the names that ``save_pretrained`` or ``state_dict`` uses."""
        held = dict(_held_tensors(model))
        by_name = _by_stored_name(model, held) if as_saved else model.state_dict()
        return cls(
            held, by_name, tuple(sorted((tensor.data_ptr(), name) for name, tensor in held.items()))
        )

    def owner(self, tensor: torch.Tensor) -> str | None:
        """Name in the model of the parameter that ``tensor`` is, or is a part of.

        None for a copy.
        """
        index = bisect_right(self.starts, tensor.data_ptr(), key=lambda start: start[0]) - 1
        if index < 0:
            return None
        start, name = self.starts[index]
        return name if tensor.data_ptr() < start + self.held[name].nbytes else None

    def view(self, tensor: torch.Tensor, owner: str) -> ParameterView:
        """Where ``tensor`` lies within the parameter of the name ``owner``."""
        offset = (tensor.data_ptr() - self.held[owner].data_ptr()) // tensor.itemsize
        return ParameterView(owner, tuple(tensor.shape), tuple(tensor.stride()), offset)


def parameter_views(model: nn.Module, *, as_saved: bool = True) -> dict[str, ParameterView]:
    """Stored name -> where it lies in the model, for every floating tensor that is no copy.

    Args:
        model: Any module.
        as_saved: By the names under which ``save_pretrained`` writes; otherwise by those of
            ``state_dict``.
    """
    stored = StoredTensors.of(model, as_saved=as_saved)
    views = {}
    for name, tensor in stored.by_name.items():
        is_weight = tensor.is_floating_point() and tensor.numel()
        owner = stored.owner(tensor) if is_weight else None
        if owner is not None:
            views[name] = stored.view(tensor, owner)
    return views


def name_in_class(model: nn.Module, known: Collection[str], name: str) -> str:
    """What the class of a model calls a stored tensor.

    A tower may be stored by itself, without the prefix that it has in a model with a head, and the
    other way round; transformers loads both (``base_model_prefix``).

    Args:
        model: Any module.
        known: The model's own stored names.
        name: In a checkpoint that the model was loaded from.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if name in known or not prefix:
        return name
    others = (f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((other for other in others if other in known), name)


def memory_of(tensor: torch.Tensor) -> object:
    """A key that is the same for tensors which are the same memory seen in the same way."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _held_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every distinct floating parameter and stored buffer of the model."""
    seen: set[object] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.numel() and memory_of(tensor) not in seen:
            seen.add(memory_of(tensor))
            yield name, tensor


def _by_stored_name(model: nn.Module, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored name -> the memory of the model that ``save_pretrained`` would write under it.

    Where saving copies and the elements are not evenly spaced, it is the copy.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, torch.Tensor] = model.state_dict()
    if not isinstance(model, PreTrainedModel):
        return state
    stored = dict(revert_weight_conversion(model, state))
    renamed = {memory_of(tensor) for tensor in stored.values()}
    for name, tensor in held.items():
        if memory_of(tensor) not in renamed:
            numbers = torch.arange(tensor.numel()).view(tensor.shape)
            for key, elements in revert_weight_conversion(model, {name: numbers}).items():
                part = _strided_part(tensor.detach(), elements)
                if part is not None:
                    stored[key] = part
    return stored


def _strided_part(tensor: torch.Tensor, elements: torch.Tensor) -> torch.Tensor | None:
    """The view of a contiguous ``tensor`` that holds the elements of these numbers.

    None if they are not evenly spaced.
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
