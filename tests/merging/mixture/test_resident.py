"""Trials in a resident model of the whole shape: they compute what the smaller model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import Field, Recipe, Source
from mergesearch.merging.family.family import open_family
from mergesearch.merging.mixture import orders
from mergesearch.merging.mixture.in_recipe import as_it_is, mixture_of, with_mixture
from mergesearch.merging.mixture.resident import MixtureWriter, empty_arenas
from mergesearch.merging.mixture.writing import shrink_mixture
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.merged_model import MergedModel
from tests.merging.mixture.conftest import KINDS
from tests.merging.mixture.test_writing import answers

Recipes = Callable[..., Any]


def template_of(text: dict[str, Any]) -> Recipe:
    """A study's recipe, which keeps all five experts of two blocks."""
    given = text["hyperparameters"]
    size = open_family(Recipe(Source("base", text["base"]), (), "", Field.constant(1, [])))
    field = Field.constant(size.layout.size, [])
    whole = Recipe(Source("base", text["base"]), (), "task_arithmetic", field)
    return with_mixture(whole, text["operator"], {**given, "experts": [5, 5]})


def resident(template: Recipe, folder: Path) -> tuple[MixtureWriter, MergedModel]:
    writer = MixtureWriter(template, folder)
    model = load_model(template.base.path, "AutoModelForCausalLM")
    merged = MergedModel(model, empty_arenas(open_family(template)))
    writer.attach(merged)
    return writer, merged


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_computes_what_its_model_computes(
    kind: str, recipe_text: Recipes, tmp_path: Path
) -> None:
    template = template_of(recipe_text(kind, "mc_smoe"))
    whole = answers(load_model(template.base.path, "AutoModelForCausalLM"))
    writer, merged = resident(template, tmp_path / "arenas")
    assert torch.equal(answers(merged.model), whole)
    weights = np.random.default_rng(0).uniform(-0.5, 1.0, (2, 5)).tolist()
    trials: list[dict[str, Any]] = [
        {"experts": [2, 4]},
        {"experts": [1, 1]},
        {"experts": [3, 3], "weights": weights, "router": "mean"},
        {"experts": [2, 3], "router": "all", "rank": 0.5, "density": 0.1},
    ]
    for number, options in enumerate(trials if kind == "mixtral" else trials[:1]):
        trial = with_mixture(template, "mc_smoe", {**dict(template.mixture), **options})
        writer.write(merged, trial)
        made = shrink_mixture(mixture_of(trial), tmp_path / f"{number}")
        smaller = load_model(str(made.folder), "AutoModelForCausalLM")
        assert torch.equal(answers(merged.model), answers(smaller)), options
    writer.write(merged, as_it_is(template))
    assert torch.equal(answers(merged.model), whole)


def test_only_blocks_that_differ_are_written_and_orders_are_found_once(
    recipe_text: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[None] = []
    real = orders.neuron_order

    def counted(*experts: Any) -> torch.Tensor:
        found.append(None)
        return real(*experts)

    monkeypatch.setattr(orders, "neuron_order", counted)
    template = template_of(recipe_text("mixtral", "mc_smoe"))
    writer, merged = resident(template, tmp_path)
    kept = merged.layout.by_name["model.layers.0.block_sparse_moe.experts.0.w1.weight"].start

    def write(*counts: int) -> None:
        options = {**dict(template.mixture), "experts": [*counts], "router": "all"}
        writer.write(merged, with_mixture(template, "mc_smoe", options))

    write(2, 3)
    first = len(found)
    merged.merged[kept] += 1  # a block that is not written keeps the change
    changed = merged.merged[kept].item()
    write(2, 4)
    assert merged.merged[kept].item() == changed
    write(3, 4)
    assert merged.merged[kept].item() != changed
    write(2, 3)
    again = len(found)
    assert again >= first > 0
    # Another worker of the host finds them on disk, and counts nothing anew.
    other, model = resident(template, tmp_path)
    options = {**dict(template.mixture), "experts": [2, 3], "router": "all"}
    other.write(model, with_mixture(template, "mc_smoe", options))
    assert len(found) == again
    assert torch.equal(model.merged, merged.merged)


def test_a_router_is_whole_again_after_it_failed(recipe_text: Recipes, tmp_path: Path) -> None:
    template = template_of(recipe_text("mixtral", "mc_smoe"))
    writer, merged = resident(template, tmp_path)
    options = {**dict(template.mixture), "experts": [1, 1]}
    writer.write(merged, with_mixture(template, "mc_smoe", options))
    gate: Any = merged.model.get_submodule("model.layers.0.mlp.gate")
    with pytest.raises(RuntimeError):
        gate(torch.ones(1, 3, 3))
    assert gate.weight.shape[0] == 5
    assert gate.top_k == 2
    merged.check_binding()
