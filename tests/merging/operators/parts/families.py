"""Random families of models in memory, for tests of what operators share."""

from __future__ import annotations

from typing import Any

import torch

from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.operators.parts.matrices import Selection


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def selection(shapes: dict[str, tuple[int, ...]], **options: Any) -> Selection:
    return Selection.of(shapes, **options)


def sources(
    shapes: dict[str, tuple[int, ...]], experts: int
) -> tuple[MappingSource, list[MappingSource]]:
    states = [
        {name: draw(*shape, seed=7 * k) for name, shape in shapes.items()}
        for k in range(experts + 1)
    ]
    base, *others = [MappingSource(str(k), state, list(shapes)) for k, state in enumerate(states)]
    return base, others
