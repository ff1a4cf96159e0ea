"""Pico checkpoints and items for tests of the command line and the loop: real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from transformers import ViTConfig

LABELS = 4
SIDE = 8


@pytest.fixture(scope="session")
def pico_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of :func:`make_pico_models`."""
    return make_pico_models(tmp_path_factory.mktemp("models"))


def pico_config(width: int = 16) -> ViTConfig:
    """A ViT of two blocks for the items of :func:`make_pico_items`."""
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=SIDE,
        patch_size=4,
        num_channels=1,
        num_labels=LABELS,
    )


def make_pico_models(folder: Path) -> Path:
    """ViTs of two blocks: ``base``, the experts ``left`` and ``right``, and their ``adapters``."""
    from transformers import ViTForImageClassification

    from experiments.zoo.digits_adapters import write_adapter

    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.manual_seed(0)
        model = ViTForImageClassification(pico_config())
    model.save_pretrained(folder / "base")
    for place, name in enumerate(("left", "right")):
        generator = torch.Generator().manual_seed(place + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)
        write_adapter(folder / "base", folder / name, folder / "adapters" / name, rank=4)
    return folder


@pytest.fixture(scope="session")
def pico_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The items of :func:`make_pico_items`."""
    return make_pico_items(tmp_path_factory.mktemp("items") / "data")


def make_pico_items(folder: Path) -> Path:
    """A ``datasets`` folder with the three splits, two domains, unique ids."""
    from datasets import Dataset, DatasetDict

    rng = np.random.default_rng(0)
    splits = {}
    for split in ("search", "validation", "test"):
        count = 24
        splits[split] = Dataset.from_dict(
            {
                "pixels": rng.random((count, SIDE, SIDE)).astype("float32").tolist(),
                "label": rng.integers(0, LABELS, count).tolist(),
                "domain": [("odd", "even")[i % 2] for i in range(count)],
                "id": [f"{split}-{i}" for i in range(count)],
            }
        )
    DatasetDict(splits).save_to_disk(folder)
    return folder


def model_study(models: Path, items: Path, **sections: object) -> dict:
    """A small study of real checkpoints."""
    data: dict = {
        "name": "pico",
        "base": str(models / "base"),
        "experts": {"left": str(models / "left"), "right": str(models / "right")},
        "space": {"granularity": "block"},
        "evaluators": [
            {
                "kind": "classification",
                "data": str(items),
                "domain": "domain",
                "id": "id",
                "objectives": [
                    {"name": "odd", "metric": "accuracy", "domains": ["odd"]},
                    {"name": "even", "metric": "cross_entropy", "domains": ["even"]},
                ],
            }
        ],
        "budget": {"trials": 24},
        "selection": {"leaders": 2},
    }
    return data | sections


def write_checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None
) -> Path:
    """A checkpoint folder from tensors alone."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder
