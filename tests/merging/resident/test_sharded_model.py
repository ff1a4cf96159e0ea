"""Models on several devices: the map of layers, and the weights that run there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from mergesearch.merging import Field, InputError, Recipe, Source
from mergesearch.merging.family.family import open_family
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.resident.sharded_model import ShardedModel, device_map, dispatch

CLASS = "AutoModelForImageClassification"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("models")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=4,
    )  # fmt: skip
    with torch.random.fork_rng():
        for seed, name in enumerate(("base", "left")):
            torch.manual_seed(seed)
            ViTForImageClassification(config).save_pretrained(folder / name)
    template = Recipe(
        Source("base", str(folder / "base")),
        (Source("left", str(folder / "left")),),
        "task_arithmetic",
        Field.constant(1, [0.0]),
    )
    layout = open_family(template).layout
    return Recipe(
        template.base,
        template.experts,
        "task_arithmetic",
        Field.constant(layout.size, [0.3]),
        layout=layout.digest,
    )


def test_what_runs_on_the_devices_is_what_was_merged(recipe: Recipe, tmp_path: Path) -> None:
    arenas = open_arenas(recipe, tmp_path, threads=1)
    plain = MergedModel(load_model(recipe.base.path, CLASS), arenas)
    elsewhere = load_model(recipe.base.path, CLASS)
    sharded = ShardedModel(load_model(recipe.base.path, CLASS), elsewhere, arenas)
    pixels = torch.from_numpy(np.random.default_rng(0).random((3, 1, 8, 8), dtype="float32"))
    for coefficient in (0.3, -0.7):
        field = recipe.field.constant(recipe.field.size, [coefficient])
        plain.write(field)
        sharded.write(field)
        with torch.no_grad():
            assert torch.equal(sharded.model(pixels).logits, plain.model(pixels).logits)
    assert sharded.model is elsewhere
    assert all(
        p.data_ptr() != q.data_ptr()
        for p, q in zip(elsewhere.parameters(), plain.model.parameters(), strict=True)
    )
    with pytest.raises(InputError, match="at most 1 for a strategy that follows gradients"):
        sharded.enable_gradient()


def test_layers_are_spread_evenly_and_no_block_is_cut(recipe: Recipe) -> None:
    model = load_model(recipe.base.path, CLASS)
    size = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    device_of = device_map(model, {0: size, 1: size})
    assert set(device_of.values()) == {0, 1}
    blocks = {
        name: device
        for name, device in device_of.items()
        if ".layers." in name or ".layer." in name
    }
    assert all(name.rpartition(".")[2].isdigit() for name in blocks), device_of
    with pytest.raises(InputError, match=r"bytes of weights to fit into .* on 2 GPUs"):
        device_map(model, {0: size // 4, 1: size // 4})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_scores_as_on_one(recipe: Recipe, tmp_path: Path) -> None:
    arenas = open_arenas(recipe, tmp_path, threads=1)
    model = dispatch(load_model(recipe.base.path, CLASS), [0, 1])
    sharded = ShardedModel(load_model(recipe.base.path, CLASS), model, arenas)
    sharded.write(recipe.field)
    one = MergedModel(load_model(recipe.base.path, CLASS), arenas, device="cuda")
    one.write(recipe.field)
    pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        assert torch.allclose(
            sharded.model(pixels).logits.cuda(), one.model(pixels).logits, atol=1e-5
        )
