"""Adapters with heads of their own: kept apart, the base's or averaged, and written by exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import Recipe
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.export.head_models import head_model, load_with_head
from mergesearch.merging.family.family import open_family
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.operators.parts.task_vectors import task_factors
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.merged_model import MergedModel
from tests.merging.checkpoints.test_adapter import GOLDEN
from tests.merging.headed import headed_recipe, labelled

CLASS = "AutoModelForSequenceClassification"
COUNTS = {"mood": 2, "topic": 4}


def adapter_of(
    name: str, folder: Path, count: int, seed: int, labels: Sequence[str] | None = None
) -> Path:
    """A copy of one of peft's adapters with a head of so many classes, and other factors."""
    shutil.copytree(GOLDEN / name / "adapter", folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "adapter_model.safetensors")
    classifier = "classifier.out_proj" if name == "roberta" else "classifier"
    for key, tensor in tensors.items():
        last = key.removeprefix("base_model.model.").startswith(f"{classifier}.")
        shape = (count, *tensor.shape[1:]) if last else tensor.shape
        tensors[key] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    if labels is not None:
        (folder / "config.json").write_text(json.dumps(labelled(labels)))
    return folder


def recipe_of(name: str, adapters: Mapping[str, Path], *rest: Any, **special: str) -> Recipe:
    base = GOLDEN / name
    experts = {key: Path(f"{base}+{folder}") for key, folder in adapters.items()}
    return headed_recipe(base, experts, *rest, **({"heads": "own"} | special))


@pytest.fixture(params=["distilbert", "roberta"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapters(name: str, tmp_path: Path) -> dict[str, Path]:
    return {
        key: adapter_of(name, tmp_path / key, count, seed)
        for seed, (key, count) in enumerate(COUNTS.items())
    }


def test_searched_and_exported_models_agree(name: str, adapters: Any, tmp_path: Path) -> None:
    recipe = recipe_of(name, adapters)
    family = open_family(recipe)
    assert family.heads is not None
    heads = family.heads.of
    models = {key: head_model(family, key, CLASS, tmp_path) for key in COUNTS}
    arenas = open_arenas(recipe, tmp_path / "arenas")
    merged = MergedModel(models["mood"], arenas, head=heads["mood"])
    merged.add_head("topic", models["topic"], heads["topic"])
    merged.write(recipe.field)
    out = export_model(recipe, tmp_path / "out").folder
    assert {*load_file(out / "model.safetensors")} == {
        *load_file(GOLDEN / name / "model.safetensors")
    }
    tokens = torch.tensor([[2, 5, 7, 3]])
    for key, count in COUNTS.items():
        expected = models[key](tokens).logits
        assert expected.shape == (1, count)
        whole = export_model(recipe, tmp_path / f"{key} whole", head=key).folder
        prefix = heads[key].renamed.get("embeddings.LayerNorm.bias", "distilbert.").split(".")[0]
        assert any(n.startswith(f"{prefix}.") for n in load_file(whole / "model.safetensors"))
        for model in (load_with_head(out, key, CLASS), load_model(str(whole), CLASS)):
            ours = models[key].state_dict()
            for n, tensor in model.state_dict().items():
                assert torch.equal(tensor, ours[n]), n
            torch.testing.assert_close(model(tokens).logits, expected)


def test_the_shared_part_stays_factors(name: str, adapters: Any) -> None:
    family = open_family(recipe_of(name, adapters))
    changed = {n for e in family.experts for n in open_checkpoint(e.path).changes}  # type: ignore[attr-defined]
    assert changed
    for tensor in changed:
        factors = task_factors(family.base, family.experts, tensor)
        assert factors is not None
        assert factors.left.shape[1] == 4
    recipe = recipe_of(name, adapters, (0.5, 0.5), "lora_sparse")
    assert {*open_arenas(recipe, Path(adapters["mood"]).parent / "arenas").layout.names} >= changed


def test_heads_of_one_shape_are_apart_unless_their_classes_are_known(tmp_path: Path) -> None:
    for place, labels in enumerate((None, ("x", "y"), ("a", "b"))):
        named = {
            key: adapter_of("distilbert", tmp_path / f"{place} {key}", 2, seed, own)
            for seed, (key, own) in enumerate({"one": labels, "two": labels and ("a", "b")}.items())
        }
        heads = open_family(recipe_of("distilbert", named)).heads
        assert heads is not None
        assert "classifier.weight" in heads.of["one"].names
    # Around a base that has their classifier, two of the same classes are merged as any other part.
    base = export_model(recipe_of("distilbert", named), tmp_path / "base", head="one").folder
    around = {key: Path(f"{base}+{folder}") for key, folder in named.items()}
    assert open_family(headed_recipe(base, around, heads="own")).heads is None
    for folder in named.values():
        (folder / "config.json").unlink()
    unnamed = json.loads((base / "config.json").read_text())
    unnamed |= labelled(["LABEL_0", "LABEL_1"])
    (base / "config.json").write_text(json.dumps(unnamed))
    heads = open_family(headed_recipe(base, around, heads="own")).heads
    assert heads is not None
    assert "classifier.weight" in heads.names


def test_the_average_and_the_base_s(name: str, tmp_path: Path) -> None:
    same = {key: adapter_of(name, tmp_path / key, 3, seed) for seed, key in enumerate("ab")}
    out = export_model(recipe_of(name, same, heads="average"), tmp_path / "average").folder
    model = load_model(str(out), CLASS)
    states = [load_file(folder / "adapter_model.safetensors") for folder in same.values()]
    key = "classifier.out_proj.bias" if name == "roberta" else "classifier.bias"
    mean = sum(state[f"base_model.model.{key}"] for state in states) / 2
    torch.testing.assert_close(model.get_parameter(key).detach(), mean)
    stored = load_file(GOLDEN / name / "model.safetensors")
    if name == "distilbert":  # its own head stays, and theirs are left out
        out = export_model(recipe_of(name, same, heads="base"), tmp_path / "base").folder
        kept = load_file(out / "model.safetensors")
        assert {*kept} == {*stored}
        assert all(torch.equal(kept[n], stored[n]) for n in kept if n.startswith("vocab_"))
