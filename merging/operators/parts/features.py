"""Layers that multiply their inputs by a matrix, as operators that fit them see them.

Linear layers are matrices as they are; a convolution is one that multiplies patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mergesearch.merging.models.expert_runner import ExpertRunner, unpadded
from mergesearch.merging.operators.parts.gram import linear_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.models.calibration_items import Items
    from mergesearch.merging.models.parameter_views import ParameterView

#: Patches of a convolution that are read from a batch, at most, evenly spaced.
PATCHES = 16384


@dataclass(frozen=True)
class MatrixLayer:
    """A layer whose weight is a matrix.

    Attributes:
        module: Name in the model.
        weight: Stored name of the weight.
        bias: Stored name of the bias, if there is one.
        inputs: Dimension of the stored weight that runs over inputs.
        patch: Places of a patch that a convolution multiplies; 1 for a linear layer.
    """

    module: str
    weight: str
    bias: str | None
    inputs: int
    patch: int = 1

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """The stored weight as ``(outputs, inputs)``."""
        return stored.T if self.inputs == 0 else stored.reshape(len(stored), -1)

    def stored(self, matrix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Inverse of :meth:`matrix`."""
        return (matrix.T if self.inputs == 0 else matrix.reshape(*shape)).contiguous()


def matrix_layers(model: nn.Module, views: Mapping[str, ParameterView]) -> dict[str, MatrixLayer]:
    """Stored name of a weight -> its layer.

    Layers whose bias is stored in another way than whole are left out, and so are convolutions of
    several groups.
    """
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    whole = {
        view.parameter: name
        for name, view in views.items()
        if view.offset == 0 and view.shape == shapes.get(view.parameter)
    }
    linear = linear_weights(model, views)
    found = [(name, layer.module, layer.inputs, 1) for name, layer in linear.items()]
    found += [
        (whole[f"{module}.weight"], module, 1, size)
        for module, size in _convolutions(model).items()
        if f"{module}.weight" in whole
    ]
    layers = {}
    for name, module, inputs, patch in found:
        has_bias = getattr(model.get_submodule(module), "bias", None) is not None
        bias = whole.get(f"{module}.bias")
        if (bias is not None or not has_bias) and name == whole.get(f"{module}.weight"):
            layers[name] = MatrixLayer(module, name, bias, inputs, patch)
    return layers


def _convolutions(model: nn.Module) -> dict[str, int]:
    """Name of a convolution of one group -> places of its patches."""
    from torch import nn

    return {
        name: module.kernel_size[0] * module.kernel_size[1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        if module.groups == 1 and module.padding_mode == "zeros"
    }


def read_inputs(
    runner: ExpertRunner, layers: Sequence[MatrixLayer], items: Items
) -> dict[str, torch.Tensor]:
    """Module -> its inputs ``(vectors, inputs)`` on a batch, without padding.

    Layers that are not run are left out.
    """
    import torch

    taken: dict[str, list[torch.Tensor]] = {}

    def take(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (args[0] if args else kwargs["input"]).detach()
        taken.setdefault(name, []).append(_vectors(module, given, items.inputs))

    with ExitStack() as hooks, torch.no_grad():
        for name in {layer.module for layer in layers}:
            module = runner.model.get_submodule(name)
            handle = module.register_forward_pre_hook(partial(take, name), with_kwargs=True)
            hooks.callback(handle.remove)
        runner.run(items)
    return {name: torch.cat(found) for name, found in taken.items()}


def _vectors(
    module: nn.Module, given: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What the matrix of a layer multiplies, ``(vectors, inputs)``."""
    import torch
    from torch import nn
    from torch.nn.functional import pad, unfold

    if not isinstance(module, nn.Conv2d):
        return unpadded(given, inputs)
    # Sides that "same" adds differ where a kernel has an even size.
    sides = module._reversed_padding_repeated_twice
    patches = unfold(pad(given, sides), module.kernel_size, module.dilation, stride=module.stride)
    flat = patches.movedim(1, 2).reshape(-1, patches.shape[1])
    if len(flat) <= PATCHES:
        return flat
    return flat[torch.linspace(0, len(flat) - 1, PATCHES).long()]
