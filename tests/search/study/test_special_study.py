"""Studies of models with special tensors: exports are what was searched, policies are choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging import InputError
from mergesearch.merging.export.folder import export_model
from mergesearch.search.cli.check import describe_plan
from mergesearch.search.plan.loading import load_study
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import rescore
from mergesearch.search.spec.comparison import differences
from mergesearch.search.spec.study_file import resolve, validate
from tests.search.studies import write_study

pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")


@pytest.fixture(scope="module")
def normalised_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``left`` and ``right``: pico ResNets of other running statistics."""
    from transformers import ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("resnets")
    sizes: dict[str, Any] = {
        "embedding_size": 4,
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    with torch.random.fork_rng():  # transformers initialises from the global generator
        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=4, **sizes))
    model.save_pretrained(folder / "base")
    for index, name in enumerate(("left", "right")):
        generator = torch.Generator().manual_seed(index + 1)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_((0.3 * torch.rand(tensor.shape, generator=generator)).to(tensor.dtype))
        model.save_pretrained(folder / name)
    return folder


def study(models: Path, items: Path, **sections: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": "special",
        "base": str(models / "base"),
        "experts": {name: str(models / name) for name in ("left", "right")},
        "operator": "ties",
        "space": {"granularity": "task"},
        "strategy": "cma_es",
        "evaluators": [
            {
                "kind": "classification",
                "data": str(items),
                "id": "id",
                "objectives": [{"metric": "cross_entropy"}],
            }
        ],
        "budget": {"trials": 12},
        "selection": {"leaders": 1},
    }
    return data | sections


def recalibrating(items: Path) -> dict[str, Any]:
    inputs = {"pixel_values": "pixels"}
    calibration = {
        "data": str(items),
        "split": "search",
        "model_class": "AutoModelForImageClassification",
    }
    return {
        "batch_norm": "recalibrate",
        "calibration": calibration | {"inputs": inputs, "batch_size": 8},
    }


@pytest.mark.parametrize("policy", ["base", "merge", "recalibrate"])
def test_the_exported_winner_scores_as_recorded(
    policy: str, normalised_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    special = recalibrating(pico_items) if policy == "recalibrate" else {"batch_norm": policy}
    spec = resolve(
        validate(study(normalised_models, pico_items, special=special), "study.yaml"), tmp_path
    )
    run = run_study(spec, tmp_path / "run")
    assert {record.state for record in run.log.records} == {"complete"}
    record = run.trial(None)
    assert dict(record.recipe.special) == special
    out = export_model(record.recipe, tmp_path / "out").folder
    same = rescore(run, record, out).agreement.identical
    assert same


def test_a_study_must_choose_and_choices_cannot_change(
    normalised_models: Path, pico_items: Path
) -> None:
    undecided = validate(study(normalised_models, pico_items), "study.yaml")
    with pytest.raises(
        InputError, match="expected a policy for the running statistics of BatchNorm"
    ):
        plan_study(undecided)
    one, other = (
        validate(study(normalised_models, pico_items, special=special), "study.yaml")
        for special in ({"batch_norm": "base"}, {"batch_norm": "merge"})
    )
    assert "special     batch_norm base" in describe_plan(plan_study(one))
    assert plan_study(one).template.basis_key != plan_study(other).template.basis_key
    assert differences(one.to_dict(), other.to_dict()) == ['special.batch_norm: "base" -> "merge"']
    assert validate(one.to_dict(), "again") == one


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (
            {"vocabulary": "common"},
            "study.yaml: special.vocabulary: expected same, base or union in a study",
        ),
        ({"vocabulry": "base"}, "special.vocabulry: unknown key; did you mean 'vocabulary'"),
        ({"batch_norm": "average"}, "special.batch_norm: input should be 'refuse'"),
        (
            {"batch_norm": "recalibrate"},
            "special: .*expected calibration with batch_norm: recalibrate",
        ),
    ],
)
def test_choices_that_are_none(special: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_study(write_study(study(tmp_path, tmp_path, special=special), tmp_path))


def test_paths_of_calibration_start_at_the_study(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "items").mkdir()
    special = recalibrating(Path("items"))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study(tmp_path, tmp_path, special=special)))
    assert load_study(path).special.calibration["data"] == str(tmp_path / "items")
    text = load_study(path, ["special.batch_norm=merge", "special.calibration=null"]).special
    assert (text.batch_norm, text.calibration) == ("merge", None)
