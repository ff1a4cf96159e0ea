"""Merges as one adapter: exact where they are sums, else with their loss; and in peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import Field, InputError, Recipe
from mergesearch.merging.checkpoints.adapter_files import read_adapter
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.adapter_format.low_rank import LowRankChange, approximated, cut
from mergesearch.merging.export.adapter_format.writing import AdapterExport, export_adapter
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.export.parents import read_front_matter
from mergesearch.merging.family.family import open_family
from tests.merging.checkpoints.test_adapter import GOLDEN
from tests.merging.headed import headed_recipe

#: Base -> policies for heads, the head of the export, and what is stored whole. Patterns,
#: convolutions, embeddings, matrices as (in, out); heads that all share, or that experts keep.
CASES: dict[str, tuple[dict[str, str], str | None, tuple[str, ...]]] = {
    "vit": ({}, None, ("classifier",)),
    "gpt2": ({}, None, ()),
    "llama": ({}, None, ()),
    "roberta": ({"heads": "average"}, None, ("classifier",)),
    "distilbert": ({"heads": "own"}, "one", ("classifier", "pre_classifier")),
}


def adapter_of(name: str, folder: Path, seed: int) -> Path:
    """A copy of one of peft's adapters with other factors and another head."""
    shutil.copytree(GOLDEN / name / "adapter", folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "base_layer" not in key:
            tensors[key] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def recipe_of(name: str, place: Path, operator: str = "task_arithmetic", **special: str) -> Recipe:
    base = GOLDEN / name
    experts = {
        key: Path(f"{base}+{adapter_of(name, place / key, seed)}")
        for seed, key in enumerate(("one", "two"))
    }
    return headed_recipe(base, experts, (0.7, -0.4), operator, **special)


def full_recipe(place: Path, changed: tuple[str, ...], operator: str = "task_arithmetic") -> Recipe:
    """Two experts that are trained whole, in the tensors whose names hold one of these words."""
    experts = {}
    for seed, key in enumerate(("one", "two")):
        shutil.copytree(GOLDEN / "llama", place / key, ignore=shutil.ignore_patterns("adapter"))
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(GOLDEN / "llama" / "model.safetensors")
        for name, tensor in tensors.items():
            if any(word in name for word in changed):
                tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, place / key / "model.safetensors", metadata={"format": "pt"})
        experts[key] = place / key
    return headed_recipe(GOLDEN / "llama", experts, (0.7, -0.4), operator)


def read_back(recipe: Recipe, exported: AdapterExport) -> dict[str, torch.Tensor]:
    """The tensors of the base with the adapter, by what a model of the adapted class calls them."""
    adapted: Any = open_checkpoint(f"{recipe.base.path}+{exported.folder}")
    return {adapted.stored_as.get(name, name): adapted.read(name) for name in adapted.tensors}


def merged_tensors(
    recipe: Recipe, folder: Path, head: str | None = None
) -> dict[str, torch.Tensor]:
    return load_file(export_model(recipe, folder, head=head).folder / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_a_sum_of_adapters_is_one_adapter(name: str, tmp_path: Path) -> None:
    special, head, whole = CASES[name]
    recipe = recipe_of(name, tmp_path, **special)
    exported = export_adapter(recipe, tmp_path / "adapter", head=head)
    assert exported.to_dict()["exact"]
    assert not exported.lost
    assert exported.whole == whole
    ranks = {
        change.module: change.down.shape[0] for change in read_adapter(exported.folder).low_rank
    }
    for change in read_adapter(tmp_path / "one").low_rank:
        assert ranks[change.module] == 2 * change.down.shape[0]
    merged = merged_tensors(recipe, tmp_path / "full", head)
    ours = read_back(recipe, exported)
    prefix = "roberta." if name == "roberta" else ""  # which its base is stored without
    for key, tensor in merged.items():
        if "pooler" in key and prefix:  # no classifier has it
            continue
        own = key if key.startswith("classifier") else prefix + key
        torch.testing.assert_close(ours[own], tensor, rtol=0, atol=2e-6, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_peft_merges_it_as_we_do(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed, and no dependency")
    import transformers

    special, head, _ = CASES[name]
    recipe = recipe_of(name, tmp_path, **special)
    full = export_model(recipe, tmp_path / "full", head=head).folder
    exported = export_adapter(recipe, tmp_path / "adapter", head=head)
    config = json.loads((full / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    expected = kind.from_pretrained(full).state_dict()
    labels = {"num_labels": len(config["id2label"])} if special else {}
    base = kind.from_pretrained(recipe.base.path, **labels)
    ours = peft.PeftModel.from_pretrained(base, exported.folder).merge_and_unload().state_dict()
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-6, msg=key)


def test_the_card_names_a_base_of_the_hub_alone(tmp_path: Path) -> None:
    recipe = recipe_of("llama", tmp_path)

    def front(name: str, recipe: Recipe) -> Mapping[str, Any]:
        return read_front_matter(export_adapter(recipe, tmp_path / name).folder / "README.md")

    assert "base_model" not in front("local", recipe)  # the name of a folder
    for key in ("one", "two"):
        settings = tmp_path / key / "adapter_config.json"
        content = json.loads(settings.read_text()) | {"base_model_name_or_path": "org/tiny"}
        settings.write_text(json.dumps(content))
    told = front("told", recipe)
    assert told["base_model"] == "org/tiny"
    assert told["base_model_relation"] == "adapter"
    (tmp_path / "one" / "README.md").write_text("---\nbase_model: org/other\n---\n")
    assert "base_model" not in front("unclear", recipe)
    cached = tmp_path / "models--org--cached" / "snapshots" / "0123"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(recipe.base.path)
    recipe = replace(recipe, base=replace(recipe.base, path=str(cached)))
    assert front("cached", recipe)["base_model"] == "org/cached"


def test_pruned_adapters_too(tmp_path: Path) -> None:
    recipe = recipe_of("llama", tmp_path, "lora_sparse")
    exported = export_adapter(recipe, tmp_path / "adapter")
    assert exported.to_dict()["exact"]
    ours = read_back(recipe, exported)
    for key, tensor in merged_tensors(recipe, tmp_path / "full").items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-6, msg=key)


def test_coefficients_by_row_stay_exact_and_within_rows_do_not(tmp_path: Path) -> None:
    recipe = recipe_of("llama", tmp_path)
    layout = open_family(recipe).layout
    spec = layout.by_name["model.layers.0.mlp.down_proj.weight"]
    columns = spec.shape[1]

    def divided(position: int) -> Recipe:
        cuts = np.array([0, spec.start, spec.start + position, spec.stop, layout.size])
        values = np.array([[0.7, 0.1, 0.9, 0.7], [-0.4, 0.0, 0.3, -0.4]])
        return recipe.with_field(Field(cuts, values))

    by_row = divided(3 * columns)
    exported = export_adapter(by_row, tmp_path / "adapter")
    assert exported.to_dict()["exact"]
    ours = read_back(by_row, exported)[spec.name]
    expected = merged_tensors(by_row, tmp_path / "full")[spec.name]
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    within = divided(3 * columns + 1)
    with pytest.raises(InputError, match=r"down_proj.*--adapter-rank 16"):
        export_adapter(within, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    # At full rank nothing but rounding is missing.
    whole = export_adapter(within, tmp_path / "other", rank=8)
    assert whole.errors[spec.name] < 1e-6
    unused = export_adapter(
        recipe.with_field(Field.constant(layout.size, (0.7, 0))), tmp_path / "c"
    )
    assert unused.rank == 2  # an expert of coefficient 0 takes no rank


@pytest.mark.parametrize(
    ("operator", "adapters"),
    [("task_arithmetic", True), ("task_arithmetic", False), ("ties", False)],
)
def test_any_merge_at_a_rank_with_its_loss(operator: str, adapters: bool, tmp_path: Path) -> None:
    if adapters:
        recipe = recipe_of("llama", tmp_path, operator)
    else:
        recipe = full_recipe(tmp_path, ("proj",), operator)
    base = load_file(GOLDEN / "llama" / "model.safetensors")
    merged = merged_tensors(recipe, tmp_path / "full")
    exported = export_adapter(recipe, tmp_path / "adapter", rank=3)
    assert exported.rank == 3
    assert not exported.lost
    ours = read_back(recipe, exported)
    for name, error in exported.errors.items():
        delta = (merged[name] - base[name]).double()
        best = torch.linalg.svdvals(delta)
        oracle = float(best[3:].norm() / best.norm())
        missing = float((ours[name].double() - merged[name].double()).norm() / delta.norm())
        assert error == pytest.approx(oracle, abs=1e-4), name
        assert error == pytest.approx(missing, abs=1e-4), name
    assert max(exported.errors.values()) > 0.05
    stated = exported.to_dict()
    assert stated["worst_error"] == exported.errors[stated["worst_tensor"]]
    assert stated["mean_error"] == pytest.approx(np.mean([*exported.errors.values()]))
    card = (exported.folder / "README.md").read_text()
    assert f"{stated['worst_error']:.3g} at worst" in card
    assert f"{stated['worst_error']:.3g} at worst ({stated['worst_tensor']})" in exported.lines()[0]


def test_what_an_adapter_cannot_hold_is_named(tmp_path: Path) -> None:
    recipe = full_recipe(tmp_path, ("proj", "norm", "embed"))
    with pytest.raises(InputError, match=r"model.norm.weight.*--lossy"):
        export_adapter(recipe, tmp_path / "adapter", rank=4)
    assert not (tmp_path / "adapter").exists()
    exported = export_adapter(recipe, tmp_path / "adapter", rank=4, lossy=True)
    base = load_file(GOLDEN / "llama" / "model.safetensors")
    merged = merged_tensors(recipe, tmp_path / "full")
    assert {*exported.lost} == {n for n in base if "norm" in n or "embed" in n}
    for name, size in exported.lost.items():
        expected = (merged[name] - base[name]).norm() / base[name].norm()
        assert size == pytest.approx(float(expected), rel=1e-4)
        assert torch.equal(read_back(recipe, exported)[name], base[name])
    assert not exported.to_dict()["exact"]
    assert "model.norm.weight" in (exported.folder / "README.md").read_text()


def test_refusals(tmp_path: Path) -> None:
    own = recipe_of("distilbert", tmp_path, heads="own")
    with pytest.raises(InputError, match="give --head, one of one, two"):
        export_adapter(own, tmp_path / "adapter")
    adapted = replace(own.base, path=own.experts[0].path)
    with pytest.raises(InputError, match="a base with an adapter of its own"):
        export_adapter(
            headed_recipe(Path(adapted.path), {"e": Path(adapted.path)}, (1.0,)), tmp_path
        )
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    recipe = full_recipe(tmp_path / "full", ("proj",))
    with pytest.raises(InputError, match="received files"):
        export_adapter(recipe, tmp_path / "used", rank=2)
    export_adapter(recipe, tmp_path / "used", rank=2, overwrite=True)
    assert not (tmp_path / "used" / "file").exists()


def test_best_approximations() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 4, generator=generator)
    values = torch.linalg.svdvals(matrix.double())
    for rank in (1, 3, 4, 9):
        for delta in (matrix, matrix.T):
            change = approximated(delta, rank)
            assert change.rank == min(rank, 4)
            missing = (change.left @ change.right - delta).norm() / delta.norm()
            assert float(missing) == pytest.approx(change.error, abs=1e-6)
            oracle = values[rank:].norm() / values.norm()
            assert change.error == pytest.approx(float(oracle), abs=1e-6)
    shorter = cut(LowRankChange(matrix, matrix.T), 2)
    assert shorter.rank == 2
    squares = values.square()
    assert shorter.error == pytest.approx(float(squares[2:].norm() / squares.norm()), abs=1e-6)
    missing = (shorter.left @ shorter.right - matrix @ matrix.T).norm() / squares.norm()
    assert float(missing) == pytest.approx(shorter.error, abs=1e-5)
