"""Running statistics that are recomputed under heads of experts: one shared part, one answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging.export.folder import export_model
from mergesearch.merging.export.head_models import head_model, load_with_head
from mergesearch.merging.family.family import open_family
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.resident.recalibration import open_recalibration
from tests.merging.headed import headed_recipe, labelled
from tests.merging.operators.calibrated import save_items

# Experts count their batches.
pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")

CLASS = "AutoModelForImageClassification"
COUNTS = {"one": 2, "two": 5}


def statistics(model: Any) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if "running_" in name}


@pytest.fixture
def recipe(pico: Any, copy_of: Callable[..., Path], tmp_path: Path) -> Any:
    """A ResNet without a head, and experts of two and five classes."""
    family = pico("resnet")

    def headed(count: int) -> Callable[[dict[str, torch.Tensor]], Any]:
        head = {"classifier.1.weight": torch.ones(count, 8), "classifier.1.bias": torch.ones(count)}
        return lambda tensors: tensors | head

    base = copy_of(family.base, lambda t: {n: v for n, v in t.items() if "classifier" not in n})
    experts = {
        name: copy_of(path, headed(count), **labelled([f"{name}{k}" for k in range(count)]))
        for path, (name, count) in zip(family.experts, COUNTS.items(), strict=True)
    }
    pixels = torch.rand((8, 8, 8), generator=torch.Generator().manual_seed(0)).tolist()
    calibration: Any = {
        "data": str(save_items(tmp_path / "items", {"pixels": pixels})),
        "model_class": CLASS,
        "inputs": {"pixel_values": "pixels"},
        "batch_size": 4,
    }
    return headed_recipe(
        base, experts, heads="own", batch_norm="recalibrate", calibration=calibration
    )


def test_every_model_and_export_has_the_same_statistics(recipe: Any, tmp_path: Path) -> None:
    family = open_family(recipe)
    assert family.heads is not None
    heads = family.heads.of
    models = {name: head_model(family, name, CLASS, tmp_path) for name in COUNTS}
    merged = MergedModel(models["one"], open_arenas(recipe, tmp_path / "a"), head=heads["one"])
    for name, model in models.items():
        merged.add_head(name, model, heads[name])
    merged.write(recipe.field)
    before = {name: t.clone() for name, t in statistics(models["two"]).items()}
    recalibration = open_recalibration(family)
    assert recalibration is not None
    recalibration.apply(merged.model)
    found = statistics(models["two"])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in found.items())
    out = export_model(recipe, tmp_path / "out").folder
    exported = [load_with_head(out, name, CLASS) for name in COUNTS]
    exported += [
        load_model(str(export_model(recipe, tmp_path / name, head=name).folder), CLASS)
        for name in COUNTS
    ]
    for model in exported:
        own = statistics(model)
        assert own.keys() == found.keys()
        assert all(torch.equal(tensor, own[name]) for name, tensor in found.items())
    assert not [*tmp_path.glob(".*")]


def test_statistics_of_a_head_are_the_head_s(recipe: Any, tmp_path: Path) -> None:
    """As if the embedder were a part of every head."""
    family = open_family(recipe)
    assert family.heads is not None
    names = {name for name in family.special.statistics if ".embedder." in name}
    heads = replace(family.heads, names=family.heads.names | names)
    recalibration = open_recalibration(replace(family, heads=heads))
    assert recalibration is not None
    model = head_model(family, "one", CLASS, tmp_path)
    before = {name: t.clone() for name, t in statistics(model).items()}
    recalibration.apply(model)
    for name, tensor in statistics(model).items():
        assert torch.equal(tensor, before[name]) == (".embedder." in name)
