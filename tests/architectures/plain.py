"""Modules with the tensors of a layout, for models that are known by names alone.

They compute nothing: a study of them has a function that scores the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.architectures.names_of import LAYOUTS, layout_shapes

#: What every weight should be, by :func:`closeness`.
GOAL = 1.01


@dataclass(frozen=True)
class Build:
    """Builds the module of a layout."""

    layout: str

    def __call__(self) -> nn.Module:
        """The module, of zeros."""
        root = nn.Module()
        for name, shape in layout_shapes(self.layout).items():
            *path, last = name.split(".")
            owner = root
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(torch.zeros(shape)))
        return root


def __getattr__(name: str) -> Any:
    """The builder of the layout of that name."""
    if name not in LAYOUTS:
        raise AttributeError(name)
    return Build(name)


def closeness(model: nn.Module) -> float:
    """How near all weights are to the goal: 0 at the goal, less elsewhere."""
    distances = [float(((p - GOAL) ** 2).mean()) for p in model.parameters()]
    return -sum(distances) / len(distances)
