"""Gradients of coefficients on a card are those of main memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging.resident.merged_model import MergedModel
from tests.pretend.device import NAME, Cards
from tests.pretend.test_merged_model import arenas_of, bind, field_of, some

Pico = Callable[[str], Any]
#: Of the largest: products are summed in blocks of another size than in main memory.
TOLERANCE = 1e-6


def run_backward(merged: MergedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    model: Any = merged.model
    if model.config.model_type == "vit":
        inputs = {"pixel_values": torch.randn((2, 1, 8, 8), generator=generator).to(model.dtype)}
    else:
        inputs = {"input_ids": torch.randint(0, 96, (2, 7), generator=generator)}
    logits = model(**{name: each.to(model.device) for name, each in inputs.items()}).logits
    logits.float().square().mean().backward()


@pytest.mark.parametrize(
    ("name", "operator"),
    some(
        ["vit", "gpt2", "llama_tied", "llama_bf16"],
        ["average", "task_arithmetic", "slerp", "tsv"],
        {("vit", "average"), ("vit", "tsv"), ("gpt2", "slerp"), ("llama_tied", "task_arithmetic")},
    ),
)
def test_is_that_of_main_memory(
    cards: Cards, pico: Pico, tmp_path: Path, name: str, operator: str
) -> None:
    arenas = arenas_of(pico(name), tmp_path, operator)
    found = []
    for device in (NAME, "cpu"):
        merged = bind(pico(name), arenas, device)
        field = field_of(merged, arenas)
        merged.enable_gradient()
        merged.write(field)
        merged.clear_gradient()
        run_backward(merged)
        found.append((merged.gradient(field), merged.cosines(field)))
    for there, here in zip(*found, strict=True):
        scale = np.abs(here).max()
        assert scale > 0
        assert np.abs(there - here).max() <= TOLERANCE * scale


def test_moves_sums_alone_to_the_host(cards: Cards, pico: Pico, tmp_path: Path) -> None:
    arenas = arenas_of(pico("llama_tied"), tmp_path, "task_arithmetic")
    merged = bind(pico("llama_tied"), arenas, NAME)
    field = field_of(merged, arenas)
    merged.enable_gradient()
    merged.write(field)
    run_backward(merged)
    with cards.counting() as counted:
        merged.gradient(field)
    assert 0 < counted.device_to_host < merged.merged.nbytes / 10
    assert counted.host_to_device < merged.merged.nbytes / 10
