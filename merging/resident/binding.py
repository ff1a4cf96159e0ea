"""Parameters of a model as views into one buffer of merged weights.

Names differ: transformers 5 stores a ViT as
``vit.encoder.layer.0.attention.attention.query.weight`` and keeps it in memory as
``vit.layers.0.attention.q_proj.weight``. The map between the two is taken from transformers itself
(:mod:`mergesearch.merging.models.parameter_views`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mergesearch.merging.errors import CheckpointError, MergesearchError
from mergesearch.merging.models.parameter_views import ParameterView, StoredTensors, memory_of
from mergesearch.merging.tensors.layout import Layout, TensorSpec


@dataclass(frozen=True, eq=False)
class CopiedTensor:
    """A stored tensor that cannot be a view into the buffer and is copied from it.

    It is a part of a fused parameter, or the model keeps it in another dtype.

    Attributes:
        spec: Position in the buffer.
        target: The model's memory of the tensor.
        owner: The parameter that the memory belongs to.
        view: Where the tensor lies in that parameter.
    """

    spec: TensorSpec
    target: torch.Tensor
    owner: torch.Tensor
    view: ParameterView


@dataclass(frozen=True, eq=False)
class Binding:
    """A model whose weights are in one buffer.

    Attributes:
        buffer: Merged weights ``(size,)``.
        bound: Parameter name -> the parameter, which is a view into the buffer, and its position.
        copied: Tensors that have to be copied after every change of the buffer.
    """

    buffer: torch.Tensor
    bound: Mapping[str, tuple[torch.Tensor, TensorSpec]]
    copied: tuple[CopiedTensor, ...]

    def check(self) -> None:
        """Check that every bound parameter still lies at its position in the buffer.

        Raises:
            MergesearchError: If one does not.
        """
        first = self.buffer.data_ptr()
        itemsize = self.buffer.itemsize
        for name, (tensor, spec) in self.bound.items():
            if tensor.data_ptr() != first + spec.start * itemsize:
                raise MergesearchError(
                    f"parameter {name!r}: expected inside the merged buffer, received another "
                    "address; do not move or cast a bound model, bind a new one"
                )

    def update_copies(self) -> None:
        """Bring the copied tensors up to date with the buffer."""
        for copied in self.copied:
            copied.target.copy_(slice_of(self.buffer, copied.spec))


def slice_of(buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """One tensor of a buffer over the flat index, as a view."""
    return buffer[spec.start : spec.stop].view(spec.shape)


def bind(
    model: nn.Module, layout: Layout, buffer: torch.Tensor, copied_from_base: Collection[str]
) -> Binding:
    """Make the parameters of a model views into ``buffer``.

    Args:
        model: Its parameters are re-pointed.
        layout: Positions of the stored tensors in the buffer.
        buffer: ``(size,)``.
        copied_from_base: Stored tensors that the model has already, and keeps.

    Raises:
        CheckpointError: If a stored tensor is no part of the model, or a parameter is not stored.
    """
    stored = StoredTensors.of(model)
    bound: dict[str, tuple[torch.Tensor, TensorSpec]] = {}
    copied: list[CopiedTensor] = []
    filled = dict.fromkeys(stored.held, 0)
    for spec in layout.tensors:
        if spec.size == 0:
            continue
        target = stored.by_name.get(spec.name)
        name = None if target is None else stored.owner(target)
        if target is None or name is None or tuple(target.shape) != spec.shape:
            raise CheckpointError(
                f"tensor {spec.name!r}: expected a parameter of {type(model).__name__} of shape "
                f"{list(spec.shape)}, found none; choose the auto class that the checkpoint was "
                "trained with"
            )
        owner = stored.held[name]
        filled[name] += spec.size
        if memory_of(target) == memory_of(owner) and target.dtype == buffer.dtype:
            bound[name] = (owner, spec)
        else:
            copied.append(CopiedTensor(spec, target, owner, stored.view(target, name)))
    for name in copied_from_base:
        target = stored.by_name.get(name)
        owner_name = None if target is None else stored.owner(target)
        if target is not None and owner_name is not None:
            filled[owner_name] += target.numel()
    _check_filled(model, stored.held, filled)
    for tensor, spec in bound.values():
        tensor.data = slice_of(buffer, spec)
    return Binding(buffer, bound, tuple(copied))


def _check_filled(
    model: nn.Module, held: Mapping[str, torch.Tensor], filled: Mapping[str, int]
) -> None:
    """Refuse parameters that the checkpoint does not hold.

    Buffers may be constants that a merge leaves alone.
    """
    parameters = {memory_of(parameter) for parameter in model.parameters()}
    for name, tensor in held.items():
        if memory_of(tensor) in parameters and filled[name] != tensor.numel():
            raise CheckpointError(
                f"parameter {name!r} of {type(model).__name__}: expected in the checkpoint, found "
                f"{filled[name]} of {tensor.numel()} values; choose the auto class that the "
                "checkpoint was trained with"
            )
