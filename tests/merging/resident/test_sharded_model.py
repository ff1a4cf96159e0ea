"""Models on several devices: the map of layers, and the weights that run there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from mergesearch.merging import Field, InputError, Recipe, Source
from mergesearch.merging.family.family import open_family
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.device_map import device_map, dispatch
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.resident.sharded_model import ShardedModel

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
    device_of = device_map(model, {"cpu": size, "cpu:0": size})
    assert set(device_of.values()) == {"cpu", "cpu:0"}
    blocks = {
        name: device
        for name, device in device_of.items()
        if ".layers." in name or ".layer." in name
    }
    assert all(name.rpartition(".")[2].isdigit() for name in blocks), device_of
    assert list(blocks.values()) == ["cpu", "cpu", "cpu:0", "cpu:0"]
    with pytest.raises(InputError, match=r"bytes of weights to fit into .* on 2 GPUs"):
        device_map(model, {"cpu": size // 4, "cpu:0": size // 4})
    with pytest.raises(InputError, match="bytes of weights to fit into"):
        device_map(model, {"cpu": size, "cpu:0": size}, needed=4)


@pytest.mark.parametrize("operator", ["task_arithmetic", "average", "ties", "slerp"])
def test_each_device_merges_its_own_tensors(recipe: Recipe, tmp_path: Path, operator: str) -> None:
    """Main memory under two names stands for two devices."""
    arenas = open_arenas(replace(recipe, operator=operator), tmp_path)
    whole = load_model(recipe.base.path, CLASS)
    plain = MergedModel(whole, arenas)
    size = sum(tensor.numel() * 4 for tensor in whole.state_dict().values())
    devices = device_map(whole, {"cpu": size, "cpu:0": size})
    parts = MergedModel(load_model(recipe.base.path, CLASS), arenas, devices=devices)
    assert [str(shard.merged.device) for shard in parts.shards] == ["cpu", "cpu"]
    assert sum(len(shard.layout.tensors) for shard in parts.shards) == len(arenas.layout.tensors)
    assert all(shard.terms.memory.nbytes < 0.7 * arenas.memory.nbytes for shard in parts.shards)
    rng = np.random.default_rng(0)
    cuts = np.unique([0, arenas.layout.size, *rng.integers(1, arenas.layout.size, 9)])
    field = Field(cuts, rng.uniform(0.1, 0.9, (1, len(cuts) - 1)))
    pixels = torch.from_numpy(rng.random((3, 1, 8, 8), dtype="float32"))
    results = []
    for merged in (plain, parts):
        merged.write(field)
        merged.enable_gradient()
        merged.clear_gradient()
        logits = merged.model(pixels).logits
        torch.autograd.backward(logits.square().sum())
        results.append((logits.detach(), merged.gradient(field), merged.cosines(field)))
    (logits, gradient, cosines), (own_logits, own_gradient, own_cosines) = results
    assert torch.equal(logits, own_logits)
    np.testing.assert_allclose(own_gradient, gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(own_cosines, cosines, rtol=1e-9, atol=1e-12)
    for one, other in zip(plain.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_scores_as_on_one(recipe: Recipe, tmp_path: Path) -> None:
    arenas = open_arenas(recipe, tmp_path, threads=1)
    model = load_model(recipe.base.path, CLASS)
    devices = device_map(model, {"cuda:0": 1e6, "cuda:1": 1e6})
    sharded = MergedModel(model, arenas, devices=devices)
    dispatch(model, devices)
    sharded.write(recipe.field)
    one = MergedModel(load_model(recipe.base.path, CLASS), arenas, device="cuda")
    one.write(recipe.field)
    pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        assert torch.allclose(
            sharded.model(pixels).logits.cuda(), one.model(pixels).logits, atol=1e-5
        )
