"""Layers fitted to mean features: the least squares solution, whatever models share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.family.family import open_family
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.operators.parts.least_squares import (
    Layer,
    Moments,
    fitted,
    owners,
    shares_of,
)
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.recipe_file import load_recipe
from mergesearch.merging.tensors.owned import owned_units
from tests.merging.alignment.models import saved
from tests.merging.operators.calibrated import images as items
from tests.merging.operators.calibrated import save_items

INPUTS = 7
OUTPUTS = 5
VECTORS = 60


def models(count: int, seed: int = 0) -> tuple[list[torch.Tensor], ...]:
    """Inputs, weights and biases of a layer in some models, in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(*shape, generator=generator).double() for _ in range(count)]

    return drawn(VECTORS, INPUTS), drawn(OUTPUTS, INPUTS), drawn(OUTPUTS)


def kept(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each model has one input and one output for itself."""
    inputs = torch.ones(count, INPUTS, dtype=torch.bool)
    outputs = torch.ones(count, OUTPUTS, dtype=torch.bool)
    for model in range(count):
        for each in range(count):
            inputs[each, model] = outputs[each, model] = each == model
    return inputs, outputs


def reference(
    inputs: list[torch.Tensor],
    weights: list[torch.Tensor],
    biases: list[torch.Tensor] | None,
    owned: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias by least squares on all vectors, output by output."""
    mean = sum(s * z for s, z in zip(shares_of(owned[0]), inputs, strict=True))
    each = [z @ w.T for z, w in zip(inputs, weights, strict=True)]
    if biases is not None:
        each = [o + b for o, b in zip(each, biases, strict=True)]
    target = sum(s * o for s, o in zip(shares_of(owned[1]), each, strict=True))
    weight = torch.zeros(OUTPUTS, INPUTS).double()
    bias = torch.zeros(OUTPUTS).double()
    for output in range(OUTPUTS):
        read = owned[0][owned[1][:, output]].any(0)
        columns = [mean[:, read], *([torch.ones(VECTORS, 1).double()] if biases else [])]
        found = torch.linalg.lstsq(torch.cat(columns, 1), target[:, output]).solution
        weight[output, read] = found[: int(read.sum())]
        bias[output] = found[-1] if biases else 0
    return weight, bias


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_the_fit_is_the_least_squares_solution(count: int, with_bias: bool, apart: bool) -> None:
    inputs, weights, biases = models(count)
    owned = kept(count) if apart else tuple(torch.ones_like(each) for each in kept(count))
    # As wide layers have them: no model reads what is another's.
    weights = [w * owned[0][k] for k, w in enumerate(weights)]
    moments = Moments(shares_of(owned[0]))
    for part in range(0, VECTORS, 20):
        moments.add([z[part : part + 20] for z in inputs])
    layer = Layer(weights, biases if with_bias else None, *owned)
    parts = fitted(layer, moments, ridge=1e-9)
    weight, bias = reference(inputs, weights, biases if with_bias else None, owned)
    found = weights[0] + sum(part for part, _ in parts)
    torch.testing.assert_close(found, weight, atol=1e-4, rtol=0)
    if with_bias:
        ours = biases[0] + sum(part for _, part in parts if part is not None)
        torch.testing.assert_close(ours, bias, atol=1e-4, rtol=0)


def test_a_large_ridge_gives_the_mean() -> None:
    inputs, weights, _ = models(3)
    owned = tuple(torch.ones_like(each) for each in kept(3))
    moments = Moments(shares_of(owned[0]))
    moments.add(inputs)
    parts = fitted(Layer(weights, None, *owned), moments, ridge=1e9)
    found = weights[0] + sum(part for part, _ in parts)
    torch.testing.assert_close(found, torch.stack(weights).mean(0), atol=1e-6, rtol=0)


def test_sources_without_owners_have_all_units() -> None:
    assert owned_units(object(), "weight") == ()
    assert owners([(), ()], 1, 3).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    for kind in ("vit", "resnet"):
        for seed, name in enumerate("abc"):
            saved(kind, folder / kind / name, seed)
    save_items(folder / "items", items(12, 0))
    return folder


def recipe(
    folder: Path, out: Path, kind: str, align: dict[str, Any], experts: str = "b", **more: Any
) -> Recipe:
    import yaml

    given = {
        "data": str(folder / "items"),
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
    }
    text = {
        "base": str(folder / kind / "a"),
        "experts": {name: {"path": str(folder / kind / name), "align": align} for name in experts},
        "operator": "pleas",
        "hyperparameters": {"calibration": given},
        "coefficients": 1.0,
        **({"special": {"batch_norm": "merge"}} if kind == "resnet" else {}),
        **more,
    }
    (out / "recipe.yaml").write_text(yaml.safe_dump(text))
    return load_recipe(out / "recipe.yaml")


def logits(path: Path) -> torch.Tensor:
    model = load_model(str(path), "AutoModelForImageClassification")
    pixels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: torch.Tensor = model(pixel_values=pixels).logits
    return found


@pytest.mark.parametrize("experts", ["b", pytest.param("bc", marks=pytest.mark.slow)])
def test_models_that_share_no_unit_give_the_mean_of_their_answers(
    folder: Path, tmp_path: Path, experts: str
) -> None:
    align = {"method": "pleas", "fraction": 1.0, "sweeps": 1}
    export_model(recipe(folder, tmp_path, "resnet", align, experts), tmp_path / "out")
    each = [logits(folder / "resnet" / name) for name in "a" + experts]
    found = logits(tmp_path / "out")
    torch.testing.assert_close(found, torch.stack(each).mean(0), atol=1e-4, rtol=0)


def test_nothing_goes_between_units_of_different_models(folder: Path, tmp_path: Path) -> None:
    align = {"method": "pleas", "fraction": 0.5, "sweeps": 1}
    chosen = recipe(folder, tmp_path, "resnet", align)
    family = open_family(chosen)
    export_model(chosen, tmp_path / "out")
    model = load_model(str(tmp_path / "out"), "AutoModelForImageClassification")
    name = "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight"
    weight = model.state_dict()[name]
    ours, theirs = (owned_units(source, name) for source in family.sources)
    for one, other in ((ours, theirs), (theirs, ours)):
        rows = one[0] & ~other[0]
        columns = other[1] & ~one[1]
        assert rows.sum() == columns.sum() == 4
        assert (weight[rows][:, columns] == 0).all()
        assert (weight[rows][:, one[1]] != 0).any()


def test_no_items_are_needed(folder: Path, tmp_path: Path) -> None:
    align = {"method": "weight_matching", "sweeps": 1}
    noise = recipe(folder, tmp_path, "vit", align, hyperparameters={})
    export_model(noise, tmp_path / "noise")
    mean = recipe(folder, tmp_path, "vit", align, hyperparameters={"ridge": 1e9})
    export_model(mean, tmp_path / "mean")
    assert (logits(tmp_path / "noise") - logits(tmp_path / "mean")).abs().max() > 1e-3


def test_other_operators_that_run_models_are_refused(folder: Path, tmp_path: Path) -> None:
    align = {"method": "pleas", "fraction": 0.5}
    with pytest.raises(RecipeError, match="or pleas"):
        export_model(recipe(folder, tmp_path, "vit", align, operator="regmean"), tmp_path / "out")
