"""`mergesearch lock`, and experts of a study that are unlocked: exported as they were searched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergesearch.search.spec.study_file import validate
from tests.search.cli.test_cli import mergesearch, refused
from tests.search.conftest import model_study, pico_config
from tests.search.studies import write_study


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with two experts, of which ``right`` is locked."""
    from transformers import ViTForImageClassification

    folder = tmp_path_factory.mktemp("locked")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(pico_config(32))
        model.save_pretrained(folder / "base")
        for name in ("left", "plain"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.002 * torch.randn(parameter.shape))
            model.save_pretrained(folder / name)
    code, out, _ = mergesearch("lock", folder / "plain", "--out", folder / "right", "--json")
    assert code == 0
    assert json.loads(out)["difference"] < 1e-4
    return folder


def _study(locked: Path, pico_items: Path, tmp_path: Path, unlock: bool) -> Path:
    study = model_study(
        locked,
        pico_items,
        budget={"trials": 8},
        strategy="sobol",
        space={"granularity": "task"},
    )
    if unlock:
        study["experts"]["right"] = {"path": str(locked / "right"), "unlock": True}
    return write_study(study, tmp_path)


def test_a_locked_expert_of_a_study_is_named_in_one_line(
    locked: Path, pico_items: Path, tmp_path: Path
) -> None:
    message = refused("check", _study(locked, pico_items, tmp_path, unlock=False))
    assert message.startswith(f"expert 'right' ({locked / 'right'}): expected heads near ")
    assert "set unlock: true (" in message
    assert "% of distance recovered" in message


@pytest.mark.slow
def test_an_unlocked_expert_is_searched_and_exported_as_it_was_evaluated(
    locked: Path, pico_items: Path, tmp_path: Path
) -> None:
    study = _study(locked, pico_items, tmp_path, unlock=True)
    code, out, err = mergesearch("check", study)
    assert code == 0, err
    assert "right: fine-tuned" in out
    assert "re-aligned: " in out
    code, _, err = mergesearch("run", study, "--run", tmp_path / "run", "--progress", "quiet")
    assert code == 0, err
    code, out, err = mergesearch("export", tmp_path / "run", "--out", tmp_path / "best", "--json")
    assert code == 0, err
    code, out, err = mergesearch("replay", tmp_path / "best")
    assert code == 0, out + err


def test_options_of_an_expert_become_policies() -> None:
    study = {
        "name": "x",
        "base": "b",
        "experts": {"one": "a", "two": {"path": "c", "unlock": True}, "three": {"path": "d"}},
        "evaluators": [{"kind": "classification", "data": "d"}],
        "budget": {"trials": 3},
    }
    spec = validate(study, "x")
    assert spec.experts == {"one": "a", "two": "c", "three": "d"}
    assert spec.special.unlock == ("two",)
    with pytest.raises(Exception, match="expected a path, or"):
        validate(study | {"experts": {"one": {"path": "a", "key": 1}}}, "x")
