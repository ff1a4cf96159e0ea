"""Rounding to bits: the values, threads, dtypes; the same in a resident model and an export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergesearch.merging.models.layer_bits as layer_bits
from mergesearch.merging import Field, InputError, Recipe, RecipeError, Source
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.adapter_format.writing import export_adapter
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.models.layer_bits import at_bits, bit_layers, check_hqq, rounded_tensors
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.recipe_file import shorthand_of
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.merged_model import MergedModel
from tests.search.conftest import make_pico_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_models(tmp_path_factory.mktemp("models"))


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", [(6, 128), (5, 48), (3, 21), (4, 2, 3, 3), (2, 5, 32)])
def test_a_group_has_as_many_values_as_its_bits_allow(shape: tuple[int, ...]) -> None:
    matrix = weights(*shape)
    columns = shape[-1] if len(shape) == 3 else matrix.numel() // shape[0]
    group = next((size for size in (64, 32, 16) if columns % size == 0), columns)
    errors = []
    for width in (2, 3, 4, 8):
        rounded = at_bits(matrix, width)
        assert rounded.shape == matrix.shape
        values = [len(row.unique()) for row in rounded.reshape(-1, group)]
        assert max(values) <= 2**width
        errors.append(float((rounded - matrix).norm() / matrix.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_dtypes_stay_and_equal_values_survive() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        matrix = weights(4, 64).to(dtype)
        assert at_bits(matrix, 4).dtype == dtype
    constant = torch.full((2, 64), 0.25)
    assert torch.equal(at_bits(constant, 2), constant)
    assert not at_bits(torch.full((2, 64), torch.nan), 2).isfinite().any()


def test_threads_change_nothing() -> None:
    matrix = weights(300, 128)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pairs = [("v", 2), ("w", 3)]
            results.append(dict(rounded_tensors(pairs, lambda name: matrix, threads))["w"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def recipe_at(models: Path) -> Recipe:
    layout = layout_of(open_checkpoint(str(models / "base")))
    widths = zip(bit_layers(layout), (2, 4), strict=True)
    return Recipe(
        Source("base", str(models / "base")),
        tuple(Source(name, str(models / name)) for name in ("left", "right")),
        "task_arithmetic",
        Field.constant(layout.size, [0.4, 0.3]),
        layout=layout.digest,
        bits=tuple(sorted((name, width) for layer, width in widths for name in layer.tensors)),
    )


def tensors_of(merged: MergedModel) -> dict[str, torch.Tensor]:
    (shard,) = merged.shards
    return {name: shard.slice_of(name).clone() for name in merged.layout.names}


def test_a_resident_model_and_an_export_hold_the_same_bits(models: Path, tmp_path: Path) -> None:
    recipe = recipe_at(models)
    arenas = open_arenas(recipe, tmp_path / "arenas")
    merged = MergedModel(
        load_model(str(models / "base"), "AutoModelForImageClassification"), arenas
    )
    merged.write(recipe.field, recipe.bits)
    resident = tensors_of(merged)
    exported = load_file(export_model(recipe, tmp_path / "out").folder / "model.safetensors")
    assert set(exported) == set(resident)
    assert all(torch.equal(exported[name], resident[name]) for name in exported)
    merged.write(recipe.field)
    plain = tensors_of(merged)
    changed = {name for name in exported if not torch.equal(exported[name], plain[name])}
    assert changed == set(dict(recipe.bits))


def test_what_holds_no_rounded_merge_says_so(models: Path, tmp_path: Path) -> None:
    recipe = recipe_at(models)
    with pytest.raises(InputError, match="rounded to bits"):
        export_adapter(recipe, tmp_path / "adapter")
    layout = layout_of(open_checkpoint(str(models / "base")))
    assert shorthand_of(recipe, layout, ()) is None
    card = export_model(recipe, tmp_path / "out").folder / "README.md"
    assert "rounded to bits of their own" in card.read_text()


def test_bits_of_a_recipe_are_checked(models: Path) -> None:
    data = recipe_at(models).to_dict()
    data["bits"] = {"weight": 7}
    with pytest.raises(RecipeError, match=r"expected one of \[1, 2, 3, 4, 5, 6, 8\], received 7"):
        Recipe.from_dict(data)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_bits, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install mergesearch\[bits\]"):
        check_hqq()
