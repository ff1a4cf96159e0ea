"""A study of bits: anchors are rounded, references are not, and the export is what was scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import InputError
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.models.layer_bits import bit_layers, mean_bits
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import rescore
from tests.search.conftest import model_study
from tests.search.studies import spec_of


def bits_study(models: Path, items: Path, **bits: Any) -> dict[str, Any]:
    space = {"granularity": "task", "bits": {"mean": 3.0, "choices": [2, 4], **bits}}
    return model_study(models, items, space=space, budget={"trials": 14}, strategy="sobol")


def test_the_winner_keeps_its_budget_and_is_exported_as_it_was_scored(
    pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    data = bits_study(pico_models, pico_items)
    run = run_study(spec_of(data, tmp_path), tmp_path / "run")
    assert run.verdict is not None
    layout = run.plan.layout
    assert layout is not None
    layers = bit_layers(layout)
    assert all(mean_bits(layers, dict(each.recipe.bits)) == 3.0 for each in run.log.records)
    assert len({each.recipe.bits for each in run.log.records}) == 2
    record = next(each for each in run.log.records if each.number == run.verdict.winner)
    export_model(record.recipe, tmp_path / "out")
    rescored = rescore(run, record, tmp_path / "out")
    assert (rescored.split, rescored.agreement.identical) == ("test", True)


@pytest.mark.parametrize("prior", ["zd", "lim"])
def test_anchors_are_rounded_and_references_are_not(
    pico_models: Path, pico_items: Path, tmp_path: Path, prior: str
) -> None:
    calibration = {
        "data": str(pico_items),
        "split": "search",
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
    }
    measured = {"calibration": calibration} if prior == "lim" else {}
    data = bits_study(pico_models, pico_items, prior=prior, **measured)
    plan = plan_study(spec_of(data, tmp_path))
    start = plan.space.decode(plan.space.start)
    assert start.bits
    assert {anchor.recipe.bits for anchor in plan.anchors} == {start.bits}
    assert plan.reference("base").bits == ()
    point = plan.point_of(plan.anchors[1].recipe)
    assert point is not None
    assert plan.space.decode(point) == plan.anchors[1].recipe


def test_gradients_do_not_go_through_rounding(
    pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    data = bits_study(pico_models, pico_items) | {"strategy": "adamerging"}
    with pytest.raises(InputError, match="expected a space whose merges have gradients"):
        plan_study(spec_of(data, tmp_path))
