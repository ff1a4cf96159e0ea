"""``mergesearch replay`` rebuilds merges, and says whether they are what was recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exporting import export_trial
from mergesearch.search.runs.opened import open_run
from mergesearch.search.runs.replay.replaying import Replayed, replay
from mergesearch.search.runs.replay.sources import open_source
from tests.search.cli.test_cli import mergesearch, refused
from tests.search.conftest import model_study
from tests.search.studies import spec_of, write_study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pico_models: Path, pico_items: Path) -> Path:
    """A folder with ``study.yaml``, its finished ``run``, and its exported winner ``best``."""
    folder = tmp_path_factory.mktemp("replay")
    data = model_study(pico_models, pico_items, strategy="sobol", budget={"trials": 8})
    write_study(data, folder)
    run_study(spec_of(data, folder), folder / "run")
    run = open_run(folder / "run")
    export_trial(run, run.trial(None), folder / "best", overwrite=False, rescored=False)
    return folder


def _replayed(path: Path, study: Path | None = None) -> Replayed:
    return replay(open_source(path, None), study)


def test_an_export_is_rebuilt_to_the_last_bit_and_scores_as_it_recorded(finished: Path) -> None:
    study = finished / "study.yaml"
    code, out, err = mergesearch("replay", finished / "best", "--study", study, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["identical"] is True
    assert told["weights"] == open_checkpoint(str(finished / "best")).fingerprint()
    assert told["difference"] == {
        "tensors": told["difference"]["tensors"],
        "moved": {},
        "unlike": [],
    }
    assert told["scores"]["split"] == "test"
    assert told["scores"]["identical"] is True
    assert "identical to the export" in mergesearch("replay", finished / "best")[1]


@pytest.mark.parametrize("name", ["recipe.json", "recipe.yaml"])
def test_the_recipe_alone_knows_its_weights(finished: Path, tmp_path: Path, name: str) -> None:
    alone = Path(shutil.copy(finished / "best" / name, tmp_path / f"sent{Path(name).suffix}"))
    told = _replayed(alone)
    assert told.identical is True
    assert told.difference is None


def test_other_weights_are_named_with_their_distance(finished: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(finished / "best", spoilt)
    tensors = load_file(spoilt / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = tensors[name] + torch.eye(*tensors[name].shape) * 0.25
    save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
    code, out, err = mergesearch("replay", spoilt)
    assert code == 1
    assert "DIFFERENT from the weights in the folder" in out
    assert f"1 of {len(tensors)} tensors differ, at most: {name} by 0.25" in out
    assert "the rebuilt merge is not the recorded one" in err


def test_another_digest_is_a_difference_without_the_weights(finished: Path, tmp_path: Path) -> None:
    data = json.loads((finished / "best" / "recipe.json").read_text())
    data["exported"]["weights"] = "0" * 64
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    code, out, _ = mergesearch("replay", tmp_path / "recipe.json")
    assert code == 1
    assert "DIFFERENT from those that the export recorded (0000000000000000)" in out


def test_other_scores_are_a_difference(finished: Path, tmp_path: Path) -> None:
    data = json.loads((finished / "best" / "recipe.json").read_text())
    objective = next(iter(data["exported"]["scores"]["test"]))
    data["exported"]["scores"]["test"][objective] += 0.5
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    told = _replayed(tmp_path / "recipe.json", finished / "study.yaml")
    assert told.identical is True
    assert told.agrees is False
    data["exported"]["settings"] = "other"
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    told = _replayed(tmp_path / "recipe.json", finished / "study.yaml")
    assert told.agrees is True
    assert "with other evaluators, places of data or library versions (other" in told.lines()[-1]


def test_a_trial_of_a_run_scores_as_recorded(finished: Path, tmp_path: Path) -> None:
    code, out, err = mergesearch("replay", finished / "run", "--trial", 3, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["identical"] is None
    assert told["scores"]["identical"] is True
    written = _replayed(finished / "best" / "recipe.json", finished / "run")
    assert written.scores is not None
    assert written.scores.agreement is not None
    assert written.scores.agreement.identical


def test_a_rebuilt_model_is_kept_on_request(finished: Path, tmp_path: Path) -> None:
    assert mergesearch("replay", finished / "best", "--out", tmp_path / "kept")[0] == 0
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    best = load_file(finished / "best" / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in kept.items())


def test_what_cannot_be_rebuilt_or_compared_is_refused(finished: Path, tmp_path: Path) -> None:
    by_hand = tmp_path / "by-hand.yaml"
    by_hand.write_text(mergesearch("recipe", finished / "run")[1])
    assert "expected something to compare the merge with" in refused("replay", by_hand)
    assert "--trial: expected the folder of a run" in refused("replay", by_hand, "--trial", 1)
    assert "without recipe.json, recipe.yaml and study.yaml" in refused("replay", tmp_path)
    assert "expected none with a run" in refused(
        "replay", finished / "run", "--study", finished / "study.yaml"
    )
    data = yaml.safe_load(by_hand.read_text()) | {"coefficients": 0.123}
    by_hand.write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match="expected a run with a complete trial of the merge"):
        _replayed(by_hand, finished / "run")
