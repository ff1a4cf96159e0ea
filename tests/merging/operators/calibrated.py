"""A model with the tensors of the operators' contract, and items for each expert by its name."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from mergesearch.merging.models.calibration_spec import Calibration

CLASSES = 9
WIDTH = 5
ITEMS = 6


#: The same as plain data, as recipes hold it; nothing lies there.
AS_DATA = {"data": "items", "model_class": "AutoModel", "inputs": {"inputs": "vectors"}}


class Named(Protocol):
    @property
    def name(self) -> str: ...


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, WIDTH))
        self.square = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.square(hidden * linear(hidden, self.weight).mean(dim=1, keepdim=True))


class Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(7))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.bias[:WIDTH] + self.bias[WIDTH:].sum()


class Model(nn.Module):
    """``inputs`` ``(items, 5)`` -> logits ``(items, 9)``."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(
            devices=[]
        ):  # linear layers are initialised from the global generator
            self.block = nn.ModuleDict({"0": First(), "10": Second()})
        self.scale = nn.Parameter(torch.ones(()))
        self.column = nn.Parameter(torch.ones(CLASSES, 1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs
        for block in self.block.values():
            hidden = block(hidden)
        return hidden.tanh().mean(dim=1, keepdim=True) @ self.column.T * self.scale


def calibration(experts: Sequence[Named]) -> Calibration:
    """Two batches for every expert, drawn by its name."""
    return Calibration(Model(), {expert.name: batches(expert.name) for expert in experts})


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return [{"inputs": torch.randn(ITEMS // 2, WIDTH, generator=generator)} for _ in range(2)]


def save_items(folder: Path, columns: dict[str, Any], split: str = "train") -> Path:
    """A ``datasets`` folder with one split."""
    import datasets

    silenced = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.DatasetDict({split: datasets.Dataset.from_dict(columns)}).save_to_disk(str(folder))
    finally:
        if not silenced:
            datasets.enable_progress_bars()
    return folder


def images(count: int, seed: int) -> dict[str, Any]:
    """Pixels ``(8, 8)`` and labels of three classes, for the pico ViT."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixels": torch.randn(count, 8, 8, generator=generator).tolist(),
        "label": torch.randint(0, 3, (count,), generator=generator).tolist(),
    }
