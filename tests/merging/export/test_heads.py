"""Heads of experts around one merge: one memory in a search, one backbone in an export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import Field, InputError, MergesearchError, Recipe
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.export.head_models import head_model, load_with_head
from mergesearch.merging.family.family import open_family
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.device_map import device_map, dispatch, settled
from mergesearch.merging.resident.merged_model import MergedModel
from tests.merging.headed import (
    headed_recipe,
    headless,
    labelled,
    relabelled,
    save_modalities,
    without_prefix,
)

# Experts count their batches.
pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")

CLASS = "AutoModelForImageClassification"
HEADS = {"odd": 2, "even": 5}
Copy = Callable[..., Path]


@pytest.fixture
def folders(pico: Any, copy_of: Copy) -> dict[str, Path]:
    """A base of three labels, and experts of two and five."""
    family = pico("vit")
    experts = {
        name: relabelled(copy_of, path, [f"{name}{k}" for k in range(count)])
        for path, (name, count) in zip(family.experts, HEADS.items(), strict=True)
    }
    return {"base": family.base, **experts}


def recipe_of(folders: Mapping[str, Path], **special: str) -> Recipe:
    experts = {name: path for name, path in folders.items() if name != "base"}
    return headed_recipe(folders["base"], experts, **({"heads": "own"} | special))


def searched(recipe: Recipe, folder: Path) -> MergedModel:
    """What a worker holds for the heads of all experts."""
    family = open_family(recipe)
    assert family.heads is not None
    merged = None
    for name in HEADS:
        model = head_model(family, name, CLASS, folder)
        head = family.heads.of[name]
        merged = merged or MergedModel(model, open_arenas(recipe, folder), head=head)
        merged.add_head(name, model, head)
    assert merged is not None
    merged.write(recipe.field)
    return merged


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))


def test_all_heads_share_one_memory(folders: Any, tmp_path: Path, read_tensors: Any) -> None:
    merged = searched(recipe_of(folders), tmp_path)
    odd, even = (merged.heads[name] for name in HEADS)
    assert merged.model is odd
    shared = 0
    for name, parameter in odd.named_parameters():
        other = even.get_parameter(name)
        assert (other.data_ptr() == parameter.data_ptr()) != name.startswith("classifier.")
        shared += parameter.numel() if "classifier" not in name else 0
    start = merged.merged.data_ptr()
    stop = start + merged.merged.nbytes
    assert shared == sum(spec.size for spec in merged.layout.tensors)
    inside = [p for n, p in even.named_parameters() if "classifier" not in n]
    assert all(start <= parameter.data_ptr() < stop for parameter in inside)
    for name, model in merged.heads.items():
        head = read_tensors(folders[name])["classifier.weight"]
        assert torch.equal(model.get_parameter("classifier.weight"), head)


def test_heads_lie_beside_the_layers_of_several_devices(
    folders: Any, tmp_path: Path, pixels: torch.Tensor
) -> None:
    """Main memory under two names stands for two devices."""
    recipe = recipe_of(folders)
    whole = searched(recipe, tmp_path)
    family = open_family(recipe)
    assert family.heads is not None
    merged = None
    for name in HEADS:
        model = head_model(family, name, CLASS, tmp_path)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        devices = device_map(model, {"cpu": size, "cpu:0": size})
        head = family.heads.of[name]
        arenas = open_arenas(recipe, tmp_path)
        merged = merged or MergedModel(model, arenas, devices=devices, head=head)
        merged.add_head(name, model, head)
        places = settled(model, merged.placed)
        assert {*places} == {*devices}
        dispatch(model, places)
    assert merged is not None
    assert len(merged.shards) == 2
    merged.write(recipe.field)
    for name, model in merged.heads.items():
        assert torch.equal(model(pixels).logits, whole.heads[name](pixels).logits)


@pytest.mark.parametrize("base", ["with a head", "without", "with other names"])
def test_the_exported_models_are_the_evaluated_ones(
    base: str,
    folders: Any,
    copy_of: Copy,
    read_tensors: Any,
    tmp_path: Path,
    pixels: torch.Tensor,
) -> None:
    if base == "without":
        folders = folders | {"base": headless(copy_of, folders["base"])}
    elif base == "with other names":
        folders = folders | {"base": without_prefix(copy_of, folders["base"], "vit.")}
    recipe = recipe_of(folders)
    merged = searched(recipe, tmp_path / "arenas")
    out = export_model(recipe, tmp_path / "out").folder
    for name, count in HEADS.items():
        expected = merged.heads[name](pixels).logits
        assert expected.shape == (4, count)
        whole = export_model(recipe, tmp_path / name, head=name).folder
        for model in (load_with_head(out, name, CLASS), load_model(str(whole), CLASS)):
            assert torch.equal(model(pixels).logits, expected)
            assert model.config.id2label == {k: f"{name}{k}" for k in range(count)}
    assert not list(tmp_path.glob(".out-*"))
    assert {*read_tensors(out)} == {*read_tensors(folders["base"])}


def test_a_base_that_policies_rebuild_gets_the_head_as_well(folders: Any, tmp_path: Path) -> None:
    family = replace(open_family(recipe_of(folders)), rebuilt=True)
    model = head_model(family, "even", CLASS, tmp_path)
    base = load_model(str(folders["base"]), CLASS).state_dict()
    even = load_model(str(folders["even"]), CLASS).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (even if "classifier" in name else base)[name])
    assert model.config.num_labels == HEADS["even"]


def test_one_backbone_and_the_heads(
    folders: Any, tmp_path: Path, read_tensors: Any, pico: Any
) -> None:
    recipe = recipe_of(folders)
    out = export_model(recipe, tmp_path / "out").folder
    assert not pico("vit").load(out)[1]["missing_keys"]
    stored = read_tensors(out)
    assert torch.equal(
        stored["classifier.weight"], read_tensors(folders["base"])["classifier.weight"]
    )
    for name in HEADS:
        head = read_tensors(out / "heads" / name)
        expert = read_tensors(folders[name])
        assert {*head} == {"classifier.bias", "classifier.weight"}
        assert all(torch.equal(tensor, expert[key]) for key, tensor in head.items())
        config = json.loads((out / "heads" / name / "config.json").read_text())
        assert config["id2label"]["0"] == f"{name}0"
    assert {path.name for path in (out / "heads").iterdir()} == {*HEADS}
    card = (out / "README.md").read_text()
    assert "each task was measured with its expert's" in card
    assert "| even | 2 | 85 |" in card
    whole = export_model(recipe, tmp_path / "even", head="even").folder
    assert not (whole / "heads").exists()
    assert "has the head of `even`" in (whole / "README.md").read_text()


def test_a_classifier_has_no_copy_of_the_embedding(
    pico: Any, copy_of: Copy, read_tensors: Any, tmp_path: Path
) -> None:
    """Older files of masked language models store the tied decoder beside the embedding."""
    family = pico("bert")
    tied = "cls.predictions.decoder.weight"
    words = "bert.embeddings.word_embeddings.weight"
    base = copy_of(family.base, lambda tensors: tensors | {tied: tensors[words].clone()})
    changed = {"architectures": ["BertForSequenceClassification"], **labelled(["no", "yes"])}
    head = {
        "bert.pooler.dense.weight": torch.ones(16, 16),
        "bert.pooler.dense.bias": torch.ones(16),
        "classifier.weight": torch.ones(2, 16),
        "classifier.bias": torch.ones(2),
    }

    def classifier(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t for n, t in tensors.items() if not n.startswith("cls.")} | head

    experts = {"mood": copy_of(family.experts[0], classifier, **changed)}
    recipe = headed_recipe(base, experts, (0.5,), heads="own")
    whole = export_model(recipe, tmp_path / "mood", head="mood").folder
    assert {*read_tensors(whole)} == {*read_tensors(experts["mood"])}
    assert tied in read_tensors(export_model(recipe, tmp_path / "shared").folder)
    assert tied in read_tensors(export_model(recipe, tmp_path / "base", head="base").folder)


def test_other_precisions(folders: Any, copy_of: Copy, tmp_path: Path) -> None:
    """A model has one dtype, whatever that of a head is; ``--dtype`` holds for heads too."""
    half = copy_of(folders["base"], lambda t: {name: v.bfloat16() for name, v in t.items()})
    recipe = recipe_of(folders | {"base": half})
    merged = searched(recipe, tmp_path / "arenas")
    assert {p.dtype for p in merged.heads["even"].parameters()} == {torch.bfloat16}
    out = export_model(recipe, tmp_path / "out", head="even").folder
    assert {i.dtype for i in open_checkpoint(str(out)).tensors.values()} == {"bfloat16"}
    wide = export_model(recipe, tmp_path / "wide", head="even", dtype="float32").folder
    assert {i.dtype for i in open_checkpoint(str(wide)).tensors.values()} == {"float32"}


def test_gradients_reach_coefficients_through_every_head(
    folders: Any, tmp_path: Path, pixels: torch.Tensor
) -> None:
    recipe = recipe_of(folders)
    family = open_family(recipe)
    assert family.heads is not None
    merged = searched(recipe, tmp_path)
    merged.enable_gradient()

    def loss() -> torch.Tensor:
        logits = [merged.heads[name](pixels).logits for name in HEADS]
        return sum((one.logsumexp(dim=1).square().mean() for one in logits), torch.tensor(0.0))

    merged.clear_gradient()
    for name in HEADS:
        merged.heads[name](pixels).logits.logsumexp(dim=1).square().mean().backward()
    gradient = merged.gradient(recipe.field)[:, 0]
    heads = [p for m in merged.heads.values() for n, p in m.named_parameters() if "classif" in n]
    assert all(parameter.grad is None for parameter in heads)
    step = 1e-2
    for row in range(2):
        values = []
        for sign in (1, -1):
            moved = recipe.field.values.copy()
            moved[row] += sign * step
            merged.write(Field(recipe.field.boundaries, moved))
            values.append(float(loss().detach()))
        assert gradient[row] == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2)
    assert np.all(np.abs(gradient) > 1e-4)
    with pytest.raises(MergesearchError, match="heads: expected all of them before"):
        merged.add_head("late", merged.model, family.heads.of["odd"])


def test_what_is_copied_from_the_base_is_so_around_every_head(
    pico: Any, copy_of: Copy, tmp_path: Path, read_tensors: Any
) -> None:
    """Statistics of the base, not those of the expert that a model was loaded from."""
    family = pico("resnet")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moved = {n: t + 1 if "running" in n else t for n, t in tensors.items()}
        return moved | {"classifier.1.weight": torch.ones(2, 8), "classifier.1.bias": torch.ones(2)}

    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    one, two = (copy_of(path, change, **labels) for path in family.experts)
    recipe = headed_recipe(family.base, {"one": one, "two": two}, heads="own", batch_norm="base")
    aligned = open_family(recipe)
    assert aligned.heads is not None
    assert aligned.heads.names == {"classifier.1.weight", "classifier.1.bias"}
    model = head_model(aligned, "one", CLASS, tmp_path)
    merged = MergedModel(model, open_arenas(recipe, tmp_path), head=aligned.heads.of["one"])
    merged.write(recipe.field)
    model.save_pretrained(tmp_path / "saved")
    saved = read_tensors(tmp_path / "saved")
    base = read_tensors(family.base)
    kept = [name for name in base if "running" in name or "tracked" in name]
    assert kept
    assert all(torch.equal(saved[name], base[name]) for name in kept)


def test_heads_that_there_are_not(folders: Any, tmp_path: Path) -> None:
    recipe = recipe_of(folders)
    with pytest.raises(InputError, match="head: expected one of odd, even, base, received 'cars'"):
        export_model(recipe, tmp_path / "out", head="cars")
    assert not (tmp_path / "out").exists()
    out = export_model(recipe, tmp_path / "out").folder
    with pytest.raises(InputError, match="expected one of the heads even, odd, received 'cars'"):
        load_with_head(out, "cars", CLASS)
    with pytest.raises(InputError, match=r"head: .*special: \{heads: own\}.*received 'odd'"):
        export_model(recipe_of(folders, heads="base"), tmp_path / "shared", head="odd")


@pytest.fixture
def modalities(tmp_path: Path) -> dict[str, Path]:
    return save_modalities(tmp_path)


def test_a_language_model_and_one_that_sees(
    modalities: Any, tmp_path: Path, read_tensors: Any
) -> None:
    """The language models are merged, and the encoder stays that of the one that has it."""
    experts = {name: path for name, path in modalities.items() if name != "base"}
    recipe = headed_recipe(modalities["base"], experts, absent="own")
    family = open_family(recipe)
    assert family.heads is not None
    assert {*family.layout.names} == {*read_tensors(modalities["base"])}
    classes = {"words": "AutoModelForCausalLM", "seeing": "AutoModelForImageTextToText"}
    heads = family.heads.of
    models = {n: head_model(family, n, kind, tmp_path) for n, kind in classes.items()}
    merged = MergedModel(models["words"], open_arenas(recipe, tmp_path), head=heads["words"])
    merged.add_head("seeing", models["seeing"], heads["seeing"])
    merged.write(recipe.field)
    tokens = torch.tensor([[1, 39, 39, 39, 39, 5, 7]])
    image = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"words": {"input_ids": tokens % 39}}
    inputs["seeing"] = {"input_ids": tokens, "pixel_values": image}
    out = export_model(recipe, tmp_path / "out").folder
    stored = read_tensors(out)
    tower = [name for name in stored if name.startswith("vision_tower.")]
    seeing = read_tensors(modalities["seeing"])
    assert tower
    assert all(torch.equal(stored[name], seeing[name]) for name in tower)
    assert "vision_config" in open_checkpoint(str(out)).config
    with torch.inference_mode():
        for name, kind in classes.items():
            expected = models[name](**inputs[name]).logits
            whole = export_model(recipe, tmp_path / f"{name} whole", head=name).folder
            assert torch.equal(load_model(str(whole), kind)(**inputs[name]).logits, expected)
        model = load_with_head(out, "seeing", classes["seeing"])
        assert torch.equal(model(**inputs["seeing"]).logits, expected)
        assert torch.equal(
            load_model(str(out), classes["words"])(**inputs["words"]).logits,
            models["words"](**inputs["words"]).logits,
        )
