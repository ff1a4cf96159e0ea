"""From models and data to an exported winner in five commands, without a line of YAML by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tests.evaluators.language import make_tokenizer, sentence, text_llama
from tests.search.cli.test_cli import mergesearch
from tests.search.init.journeys import NAMES, PICTURES, reviews, write_csv


def done(*arguments: object) -> str:
    """Standard output of a command that works."""
    code, out, err = mergesearch(*arguments)
    assert code == 0, err
    return out


def last_commands(study: str, out: str) -> list[list[str]]:
    """The commands that ``init`` names, as lists of words; progress is not printed."""
    lines = [line.split() for line in out.splitlines() if line.startswith("next ")]
    assert [line[2] for line in lines] == ["check", "run", "show", "export"]
    assert lines[0][3] == study
    return [[*line[2:], *(["--progress", "quiet"] if line[2] == "run" else [])] for line in lines]


def test_from_two_classifiers_and_a_table_to_a_model_in_five_commands(
    tmp_path: Path, reviewers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(reviewers)
    write_csv(tmp_path / "reviews.csv", reviews("books", 60, 7) + reviews("films", 60, 8))
    models = ("models/base", "models/books", "models/films")
    out = done("init", *models, "--data", "reviews.csv", "--minutes", 0.02)
    assert "models/base: told from its name" in out
    assert "review (text, 120 different), stars (text, 2 different)" in out
    for command in last_commands("study.yaml", out):
        said = done(*command)
    assert "(identical to the record)" in said
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reviews-merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reviews-merged")
    unseen = reviews("books", 40, 9) + reviews("films", 40, 10)
    batch = tokenizer([row["review"] for row in unseen], padding=True, return_tensors="pt")
    with torch.inference_mode():
        answers = model(**batch).logits.argmax(dim=1).tolist()
    right = [NAMES[answer] == row["stars"] for answer, row in zip(answers, unseen, strict=True)]
    assert sum(right) > 0.85 * len(right)

    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    text = (tmp_path / "study.yaml").read_text()
    schema, *rest = text.splitlines()
    assert schema == "# yaml-language-server: $schema=study.schema.json"
    assert json.loads((tmp_path / "study.schema.json").read_text())["title"] == "mergesearch study"
    study = yaml.safe_load(text)
    assert study["base"] == "models/base"
    assert [(e["text"], e["label"], e["domain"]) for e in study["evaluators"]] == [
        ("review", "stars", "kind")
    ]
    chosen = [above for above, line in pairwise(rest) if line[:1].isalpha()]
    assert len(chosen) == len(study)
    assert all(above.startswith("#") for above in chosen)


@pytest.mark.slow
def test_two_classifiers_of_pictures_with_heads_of_their_own(
    tmp_path: Path, viewers: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageClassification

    monkeypatch.chdir(tmp_path)
    models = [viewers / name for name in ("base", *PICTURES)]
    data = [x for name in PICTURES for x in ("--data", pictures / f"{name}-seen")]
    out = done("init", *models, *data, "--minutes", 0.02, "--name", "views", "--out", "views.yaml")
    assert "special     heads own" in out
    for command in last_commands("views.yaml", out):
        said = done(*command)
    assert "(identical to the record)" in said
    for name, classes in PICTURES.items():
        done("export", "runs/views", "--out", name, "--head", name)
        model = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        assert tuple(model.config.id2label.values()) == classes


@pytest.mark.slow
def test_language_models_and_a_table_of_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "poet", "clerk")):
        model = text_llama(0)
        generator = _generator(seed)
        for parameter in model.parameters():
            parameter.data += seed and 0.05 * generator(parameter)
        model.save_pretrained(tmp_path / name)
        make_tokenizer(tmp_path / name)
    rng = np.random.default_rng(0)
    rows = [{"id": n, "text": " ".join([*sentence(rng, 9), str(n)])} for n in range(60)]
    write_csv(tmp_path / "texts.csv", rows)
    out = done("init", "base", "poet", "clerk", "--data", "texts.csv", "--minutes", 0.02)
    assert "objectives  log_perplexity (minimize)" in out
    for command in last_commands("study.yaml", out):
        said = done(*command)
    assert "(identical to the record)" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "texts-merged").num_parameters() > 0


def _generator(seed: int):  # type: ignore[no-untyped-def]
    import torch

    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator)
