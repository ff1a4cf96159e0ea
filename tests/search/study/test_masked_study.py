"""Studies of merges under task masks, from the study file to a bundle that scores as recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import InputError
from mergesearch.merging.routing.bundle import load
from mergesearch.merging.routing.masked import MaskedMerge
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import export_bundle, rescore
from tests.evaluators.routing.functions import first_images
from tests.search.conftest import model_study
from tests.search.studies import spec_of

MODULE = "tests.evaluators.routing.functions"
TASKS = ("left", "right")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, pico_models: Path) -> Path:
    """The pico models: a base without a head, and experts of three and four classes."""
    folder = tmp_path_factory.mktemp("masked")
    generator = torch.Generator().manual_seed(0)
    for index, name in enumerate(("base", *TASKS)):
        tensors = load_file(pico_models / name / "model.safetensors")
        config = json.loads((pico_models / name / "config.json").read_text())
        width = tensors.pop("classifier.weight").shape[1]
        tensors.pop("classifier.bias")
        if name in TASKS:
            classes = 2 + index
            tensors["classifier.weight"] = torch.randn((classes, width), generator=generator)
            tensors["classifier.bias"] = torch.zeros(classes)
            config["id2label"] = {str(k): f"{name}{k}" for k in range(classes)}
            config["label2id"] = {f"{name}{k}": k for k in range(classes)}
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def study(models: Path, **options: Any) -> dict[str, Any]:
    section = {
        "kind": "task_masks",
        "function": f"{MODULE}:sure",
        "model_class": "AutoModelForImageClassification",
        "sizes": {"search": 6, "validation": 5, "test": 4},
        "groups": {"attention": ["*attention*"], "mlp": ["*intermediate*", "*output*", "*mlp*"]},
        "directions": 2,
    } | options
    data = model_study(
        models,
        models,
        special={"heads": "own"},
        evaluators=[section],
        strategy="cma_es",
        budget={"trials": 10},
        selection={"leaders": 1},
        allow_code=True,
    )
    del data["space"]
    return data


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {
                "router": "learned",
                "observations": f"{MODULE}:first_images",
                "router_steps": 30,
                "router_width": 8,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["head", "learned"],
)
def test_a_bundle_infers_and_scores_as_recorded(
    options: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    run = run_study(spec_of(study(models, **options), tmp_path), tmp_path / "run")
    assert all(record.state == "complete" for record in run.log.records)
    assert {"base", "expert left"} <= {record.name for record in run.log.records}
    searched = [record for record in run.log.records if record.recipe.routing]
    assert len({record.values["score"] for record in searched}) > 1
    out = tmp_path / "out"
    export_bundle(run, searched[-1], out, facts={}, overwrite=False, threads=1)
    assert rescore(run, searched[-1], out).agreement.identical
    card = (out / "README.md").read_text()
    assert (
        "It serves `left`, `right`. Each is answered under a mask of its own, by the head" in card
    )
    assert "tasks = model.tasks_of(**first)" in card
    merge = load(out)
    assert isinstance(merge, MaskedMerge)
    bright = first_images("right")["pixel_values"]
    tasks = merge.tasks_of(bright)
    assert {*tasks} <= {*TASKS}
    if options:
        assert tasks.count("right") > len(tasks) / 2
    assert merge(bright, tasks="left").logits.shape == (len(bright), 3)
    assert merge(bright, tasks="right").logits.shape == (len(bright), 4)


def test_each_group_has_a_scale_and_a_threshold(models: Path, tmp_path: Path) -> None:
    plan = plan_study(spec_of(study(models), tmp_path))
    assert plan.space.names == (
        "scale.attention",
        "threshold.attention",
        "scale.mlp",
        "threshold.mlp",
    )
    assert plan.space.start.tolist() == [1.0, 0.6, 1.0, 0.6]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"operator": "ties"}, r"operator\.name: expected one of average, task_arithmetic for "),
        (
            {"special": {"heads": "own", "scalars": "base"}},
            r"special\.scalars: expected no policy but heads,",
        ),
    ],
)
def test_what_masks_cannot_be_made_of_is_refused(
    change: dict[str, Any], said: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        plan_study(spec_of(study(models) | change, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_router_by_heads_needs_heads_of_their_own(pico_models: Path, tmp_path: Path) -> None:
    data = study(pico_models) | {"special": {}}
    with pytest.raises(InputError, match=r"evaluators\.0\.router: expected none where experts"):
        plan_study(spec_of(data, tmp_path))
    data["evaluators"][0]["router"] = "none"
    assert plan_study(spec_of(data, tmp_path)).space.names[0] == "scale.attention"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "left"}, r"evaluators\.0\.head: expected none for task_masks"),
        ({"router": "learned"}, "observations: expected a function with router: learned"),
        ({"groups": {"a b": ["*"]}}, "groups"),
        ({"groups": {"a": ["*x y*"]}}, "groups"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: dict[str, Any], said: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        plan_study(spec_of(study(models, **options), tmp_path))
