"""`mergesearch distill`: what it prints, and what it refuses before weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.merging.distillation.models import save_models
from tests.search.cli.test_cli import mergesearch, refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shapes")
    rows = [{"text": text} for text in save_models(made)]
    (made / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def test_it_says_what_it_learnt(folder: Path, tmp_path: Path) -> None:
    options = ("--steps", 4, "--batch", 4, "--rate", 0.01, "--length", 24, "--held-out", 0.2)
    command = ("distill", folder / "pivot", folder / "hill", "--data", folder / "texts.jsonl")
    code, out, err = mergesearch(*command, "--out", tmp_path / "new", *options, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["folder"] == str(tmp_path / "new")
    assert (told["texts"], len(told["covered"]), len(told["weights"])) == (19, 1, 2)
    assert told["after"] < told["before"]
    assert "step 4/4, loss " in err
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_wrong_input_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    command = ["distill", folder / "pivot", folder / "hill", "--data", folder / "texts.jsonl"]

    def message(*more: object) -> str:
        return refused(*command, "--out", tmp_path / "new", *more)

    assert "expected mince, average, selection, received 'minc'" in message("--fusion", "minc")
    assert "expected a column 'words', received only ['text']" in message("--column", "words")
    assert "steps: expected at least 1, received 0" in message("--steps", 0)
    assert "expected a file that ends in .csv" in message("--data", folder / "pivot")
    assert "expected at least 102 texts that are not empty, received 24" in message("--batch", 100)
    assert not (tmp_path / "new").exists()
