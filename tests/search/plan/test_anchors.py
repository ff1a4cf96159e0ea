"""Anchors: known merges under their true names, whatever the study's operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergesearch.merging import merge
from mergesearch.merging.export.folder import export_model
from mergesearch.search.plan.loading import load_study
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from tests.search.conftest import model_study
from tests.search.studies import write_study


@pytest.mark.parametrize("operator", ["ties", "tsv", "iso_cts"])
def test_experts_average_and_arithmetic_are_what_they_say(
    tmp_path: Path, pico_models: Path, pico_items: Path, operator: str
) -> None:
    options = {"name": operator} if operator == "ties" else {"name": operator, "matrices": "blocks"}
    data = model_study(pico_models, pico_items, operator=options)
    plan = plan_study(load_study(write_study(data, tmp_path)))
    recipes = {anchor.name: anchor.recipe for anchor in plan.anchors}
    base = load_file(pico_models / "base" / "model.safetensors")
    experts = [load_file(pico_models / name / "model.safetensors") for name in ("left", "right")]
    expected = {
        "base": base,
        "expert left": experts[0],
        "expert right": experts[1],
        "average": merge(base, experts, operator="average"),
        "task_arithmetic 0.3": merge(base, experts, operator="task_arithmetic"),
        "ties 1": merge(base, experts, operator="ties"),
    }
    assert {*expected, "LiNeS"} <= set(recipes)
    for name, tensors in expected.items():
        out = export_model(recipes[name], tmp_path / name.replace(" ", "-")).folder
        merged = load_file(out / "model.safetensors")
        assert all(torch.equal(merged[key], tensors[key]) for key in tensors), name


def test_anchors_of_other_operators_are_measured_resumed_and_not_taken_for_points(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    data = model_study(
        pico_models,
        pico_items,
        operator={"name": "iso_cts", "matrices": "blocks"},
        budget={"trials": 11},
    )
    spec = load_study(write_study(data, tmp_path))
    first = run_study(spec, tmp_path / "run")
    soup = next(record for record in first.log.records if record.name == "average")
    assert soup.recipe.operator == "average"
    assert soup.state == "complete"
    # Two experts, one fused direction: the field of the average is no point of the space.
    assert soup.recipe.field.directions == 2
    assert first.plan.template.field.directions == 1
    again = run_study(spec, tmp_path / "run")
    assert [record.recipe.digest for record in again.log.records] == [
        r.recipe.digest for r in first.log.records
    ]
    values = [[*record.values.values()] for record in first.log.records]
    assert np.array_equal(values, [[*record.values.values()] for record in again.log.records])
