"""Functions that tests let evaluators of kind ``task_masks`` call."""

from __future__ import annotations

from typing import Any

import torch

from tests.evaluators.items import SIDE

SIZES = {"search": 6, "validation": 5, "test": 4}


def images(count: int, seed: int) -> torch.Tensor:
    """Random images, some of them brighter than others."""
    generator = torch.Generator().manual_seed(seed)
    bright = torch.arange(count)[:, None, None, None] % 2
    return torch.randn(count, 1, SIDE, SIDE, generator=generator) + 2 * bright


def sure(model: Any, split: str, told: str | None = None) -> list[float]:
    """How sure a model is of the first class of each image.

    Args:
        model: A merge that takes tasks.
        split: Of the images.
        told: The task of all images; None: each is inferred from its image.
    """
    pixels = images(SIZES[split], len(split))
    tasks = told or model.tasks_of(pixel_values=pixels)
    answer = model(pixel_values=pixels, tasks=tasks)
    found: list[float] = answer.logits.softmax(dim=1)[:, 0].tolist()
    return found


def size_of_weights(model: Any, split: str) -> list[float]:
    """Numbers that need no task."""
    total = float(sum(p.square().sum() for p in model.model.parameters()))
    return [total * (k + 1 + SIZES[split]) for k in range(SIZES[split])]


def first_images(expert: str) -> dict[str, torch.Tensor]:
    """Dark images are those of the left, bright ones of the right."""
    return {"pixel_values": images(20, 9)[int(expert == "right") :: 2]}


def nothing(expert: str) -> dict[str, torch.Tensor]:
    """No observations."""
    return {}
