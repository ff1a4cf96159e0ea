"""Parameters of a model as views into buffers of merged weights.

Names differ: transformers 5 stores a ViT as
``vit.encoder.layer.0.attention.attention.query.weight`` and keeps it in memory as
``vit.layers.0.attention.q_proj.weight``. The map between the two is taken from transformers itself
(:mod:`mergesearch.merging.models.parameter_views`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from mergesearch.merging.errors import CheckpointError, MergesearchError
from mergesearch.merging.models.parameter_views import (
    ParameterView,
    StoredTensors,
    memory_of,
    name_in_class,
)
from mergesearch.merging.resident.device_map import place
from mergesearch.merging.tensors.layout import Layout


@dataclass(frozen=True, eq=False)
class CopiedTensor:
    """A stored tensor that cannot be a view into the buffer and is copied from it.

    It is a part of a fused parameter, or the model keeps it in another dtype.

    Attributes:
        name: Of the stored tensor.
        target: The model's memory of the tensor.
        owner: The parameter that the memory belongs to.
        view: Where the tensor lies in that parameter.
    """

    name: str
    target: torch.Tensor
    owner: torch.Tensor
    view: ParameterView


@dataclass(frozen=True, eq=False)
class Binding:
    """A model whose weights are in the buffers of its shards.

    Attributes:
        slices: Stored name -> merged weights, a view into a buffer.
        bound: Parameter name -> the parameter, which is such a view, and its stored name.
        copied: Tensors that have to be copied after every change of the buffers.
    """

    slices: Mapping[str, torch.Tensor]
    bound: Mapping[str, tuple[torch.Tensor, str]]
    copied: tuple[CopiedTensor, ...]

    def check(self) -> None:
        """Check that every bound parameter still lies at its position in a buffer.

        Raises:
            MergesearchError: If one does not.
        """
        for name, (tensor, stored) in self.bound.items():
            if tensor.data_ptr() != self.slices[stored].data_ptr():
                raise MergesearchError(
                    f"parameter {name!r}: expected inside the merged buffer, received another "
                    "address; do not move or cast a bound model, bind a new one"
                )

    def update_copies(self, changed: Collection[str]) -> None:
        """Bring the copied tensors up to date with the buffers.

        Args:
            changed: Stored names of those that may have become others.
        """
        for copied in self.copied:
            if copied.name in changed:
                copied.target.copy_(self.slices[copied.name])


def bind(
    model: nn.Module,
    layout: Layout,
    slices: Mapping[str, torch.Tensor],
    copied_from_base: Collection[str],
    device_of: Callable[[str], torch.device],
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> Binding:
    """Make the parameters of a model views into buffers, and bring the rest to their devices.

    The weights of the model are let go rather than copied: the buffers take their place.

    Args:
        model: In main memory; its parameters are re-pointed.
        layout: The stored tensors.
        slices: Stored name -> a view into a buffer, on the device on which the tensor is used.
        copied_from_base: Stored tensors that the model has already, and keeps.
        device_of: Name of a parameter or buffer -> the device on which it is used.
        renamed: Name in the layout -> the model's own stored name, where that is another.

    Raises:
        CheckpointError: If a stored tensor is no part of the model, or a parameter is not stored.
    """
    stored = StoredTensors.of(model)
    bound: dict[str, tuple[torch.Tensor, str]] = {}
    copied: list[tuple[str, torch.Tensor, ParameterView]] = []
    filled = dict.fromkeys(stored.held, 0)
    for spec in layout.tensors:
        if spec.size == 0:
            continue
        own = renamed.get(spec.name, spec.name)
        target = stored.by_name.get(name_in_class(model, stored.by_name, own))
        name = None if target is None else stored.owner(target)
        if target is None or name is None or tuple(target.shape) != spec.shape:
            raise CheckpointError(
                f"tensor {spec.name!r}: expected a parameter of {type(model).__name__} of shape "
                f"{list(spec.shape)}, found none; choose the auto class that the checkpoint was "
                "trained with"
            )
        owner = stored.held[name]
        filled[name] += spec.size
        if memory_of(target) == memory_of(owner) and target.dtype == slices[spec.name].dtype:
            bound[name] = (owner, spec.name)
        else:
            copied.append((spec.name, owner, stored.view(target, name)))
    for name in copied_from_base:
        target = stored.by_name.get(name_in_class(model, stored.by_name, name))
        owner_name = None if target is None else stored.owner(target)
        if target is not None and owner_name is not None:
            filled[owner_name] += target.numel()
    _check_filled(model, stored.held, filled)
    for tensor, name in bound.values():
        tensor.data = slices[name]
    place(model, device_of, but={id(tensor) for tensor, _ in bound.values()})
    parts = [
        CopiedTensor(name, view.of(owner.detach()), owner, view) for name, owner, view in copied
    ]
    return Binding(slices, bound, tuple(parts))


def tensor_devices(
    model: nn.Module, layout: Layout, device_of: Callable[[str], torch.device]
) -> dict[str, torch.device]:
    """Stored name -> the device on which the parameter that holds it is used."""
    stored = StoredTensors.of(model)
    devices = {}
    for spec in layout.tensors:
        target = stored.by_name.get(name_in_class(model, stored.by_name, spec.name))
        name = None if target is None or not spec.size else stored.owner(target)
        devices[spec.name] = device_of(name or spec.name)
    return devices


def _check_filled(
    model: nn.Module, held: Mapping[str, torch.Tensor], filled: Mapping[str, int]
) -> None:
    """Refuse parameters that the checkpoint does not hold.

    Buffers may be constants that a merge leaves alone, and so may parameters that the model never
    saves, such as Marian's sinusoids.
    """
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    parameters = {memory_of(parameter) for parameter in model.parameters()}
    for name, tensor in held.items():
        if name in computed and not filled[name]:
            continue
        if memory_of(tensor) in parameters and filled[name] != tensor.numel():
            raise CheckpointError(
                f"parameter {name!r} of {type(model).__name__}: expected in the checkpoint, found "
                f"{filled[name]} of {tensor.numel()} values; choose the auto class that the "
                "checkpoint was trained with"
            )
