"""One more expert for a finished merge: what is known of it, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import InputError, Recipe, RecipeError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export import adding
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.recipe_file import load_recipe

SHAPES = {
    "layers.0.mlp.weight": (12, 8),
    "layers.1.mlp.weight": (6, 10),
    "layers.1.mlp.bias": (7,),
    "head.weight": (3, 4),
}
NAMES = ("one", "two", "three", "four")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base and experts with weights alone, in a folder."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for k, folder in enumerate(("base", *NAMES)):
        (tmp_path / folder).mkdir()
        state = {
            name: tensor + 0.1 * k * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        save_file(state, tmp_path / folder / "model.safetensors")
    return tmp_path


def add(models: Path, merged: str, expert: str, out: str, base: str | None = None) -> Path:
    folder = models / merged
    known = adding.continued(folder, base and str(models / base))
    adding.export_next(adding.next_recipe(known, folder, str(models / expert)), models / out)
    return models / out


def opcm(models: Path, names: tuple[str, ...], out: str) -> Path:
    recipe = models / f"{out}.yaml"
    experts = {name: str(models / name) for name in names}
    options = {"order": list(names), "alpha": 0.3}
    recipe.write_text(
        json.dumps(
            {
                "base": str(models / "base"),
                "experts": experts,
                "operator": "opcm",
                "hyperparameters": options,
            }
        )
    )
    return export_model(load_recipe(recipe), models / out).folder


def check_equal(one: Path, other: Path) -> None:
    expected = load_file(other / "model.safetensors")
    for name, tensor in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)


def test_continues_a_merge_as_if_all_had_been_there(models: Path) -> None:
    opcm(models, NAMES[:2], "two-merged")
    add(models, "two-merged", "three", "more")
    # no expert that joined before is needed again
    for name in NAMES[:3]:
        (models / name).rename(models / f"{name}-gone")
    add(models, "more", "four", "most")
    for name in NAMES[:3]:
        (models / f"{name}-gone").rename(models / name)
    check_equal(models / "most", opcm(models, NAMES, "whole"))
    assert load_recipe(models / "most" / "recipe.yaml").options["joined"] == 3


def test_begins_with_one_expert_and_its_base(models: Path) -> None:
    result = add(models, "one", "two", "both", base="base")
    options = load_recipe(result / "recipe.yaml").options
    assert (options["joined"], options["factor"], options["alpha"]) == (1, 1.0, 0.5)


@pytest.mark.parametrize("damage", ["missing", "of other weights"])
def test_what_is_not_recorded_is_worked_out_from_the_recipe(models: Path, damage: str) -> None:
    first = add(models, "one", "two", "both", base="base")
    record = first / adding.FILE
    factor = json.loads(record.read_text())["factor"]
    if damage == "missing":
        record.unlink()
    else:
        record.write_text(json.dumps({"joined": 7, "factor": 9.0, "weights": "others"}))
    known = adding.continued(first)
    assert known.joined == 2
    assert known.factor == pytest.approx(factor, rel=1e-12)


def test_the_export_replays(models: Path) -> None:
    """Its recipe alone gives its weights, bit for bit."""
    result = add(models, "one", "two", "both", base="base")
    again = export_model(load_recipe(result / "recipe.yaml"), models / "again").folder
    prints = [open_checkpoint(str(folder)).fingerprint() for folder in (result, again)]
    assert prints[0] == prints[1]


def recipe_of(models: Path, operator: str, coefficients: float) -> Path:
    recipe = models / "other.yaml"
    experts = {name: str(models / name) for name in NAMES[:2]}
    options = {"order": list(experts)} if operator == "opcm" else {}
    content = {"base": str(models / "base"), "experts": experts, "operator": operator}
    content |= {"coefficients": coefficients, "hyperparameters": options}
    recipe.write_text(json.dumps(content))
    loaded: Recipe = load_recipe(recipe)
    return export_model(loaded, models / "other").folder


def test_merges_that_are_not_opcms_are_refused(models: Path) -> None:
    with pytest.raises(RecipeError, match="expected a merge by opcm or opcm_add, received 'ties'"):
        adding.continued(recipe_of(models, "ties", 1.0))


def test_coefficients_that_are_not_opcms_are_refused(models: Path) -> None:
    with pytest.raises(RecipeError, match="expected coefficients of 1"):
        adding.continued(recipe_of(models, "opcm", 0.7))


def test_weights_that_changed_since_are_refused(models: Path) -> None:
    first = add(models, "one", "two", "both", base="base")
    state = load_file(first / "model.safetensors")
    save_file({n: t + 1e-3 for n, t in state.items()}, first / "model.safetensors")
    with pytest.raises(RecipeError, match="they changed since the merge was written"):
        adding.continued(first)


def test_an_expert_without_a_base_is_refused(models: Path) -> None:
    with pytest.raises(InputError, match="give --base"):
        adding.continued(models / "one")
    first = add(models, "one", "two", "both", base="base")
    with pytest.raises(InputError, match="--base: expected none"):
        adding.continued(first, str(models / "base"))


def test_names_of_other_sources_are_refused(models: Path) -> None:
    known = adding.continued(models / "one", str(models / "base"))
    with pytest.raises(InputError, match="--name: expected another name"):
        adding.next_recipe(known, models / "one", str(models / "two"), "merged")
