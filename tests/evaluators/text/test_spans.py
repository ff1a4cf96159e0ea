"""Scores of spans are those of seqeval, over all items of a domain together."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.evaluators.metrics import libraries
from mergesearch.evaluators.metrics.spans import (
    SPAN_SCORES,
    check_spans,
    span_counts,
    span_parts,
)
from mergesearch.merging import InputError
from tests.evaluators.classified import CLASSES, classified_folder, pico_bert
from tests.evaluators.items import build, candidate_at, opened

NAMES = ("O", "B-X", "I-X")
ROWS = st.lists(
    st.lists(st.tuples(*[st.sampled_from([*NAMES, "B-Y", "I-Y"])] * 2), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
)


def section(folder: Path, **data: Any) -> dict[str, Any]:
    return {
        "kind": "token_classification",
        "data": {"file": str(folder / "texts.jsonl"), "classes": list(NAMES)} | data,
        "tokenizer": str(folder / "tokenizer"),
        "batch_size": 5,
        "objectives": [{"metric": metric} for metric in ("cross_entropy", *SPAN_SCORES)],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classified_folder(tmp_path_factory.mktemp("spans"))


@given(ROWS)
@settings(max_examples=40, deadline=None)
def test_counts_are_those_of_seqeval(rows: list[list[tuple[str, str]]]) -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    answers, tags = ([[pair[n] for pair in row] for row in rows] for n in (0, 1))
    counts = [span_counts(*pair) for pair in zip(answers, tags, strict=True)]
    for metric, pool in SPAN_SCORES.items():
        parts = list(span_parts(metric, counts).values())[1:]
        plain = getattr(metrics, f"{metric.removeprefix('span_')}_score")
        assert pool(parts) == pytest.approx(plain(tags, answers, zero_division=0))


def test_an_evaluator_scores_as_a_plain_loop(folder: Path) -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    from transformers import AutoTokenizer

    model = pico_bert("token").double()
    evaluator = opened(section(folder))
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    loaded = evaluator._tables.load("search")  # type: ignore[attr-defined]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    answers = []
    for words in loaded["words"]:
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        starts = np.cumsum([0, *map(len, pieces)])[:-1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(chain(*pieces))])).logits[0, starts]
        answers.append([NAMES[number] for number in logits.argmax(dim=1)])
    tags = [[NAMES[number] for number in row] for row in loaded["tags"]]
    for metric in SPAN_SCORES:
        score = getattr(metrics, f"{metric.removeprefix('span_')}_score")
        assert 0 < score(tags, answers) < 1
        assert measured.values[metric] == pytest.approx(score(tags, answers), rel=1e-12)
        own = [score([one], [two], zero_division=0) for one, two in zip(tags, answers, strict=True)]
        np.testing.assert_allclose(measured.items[metric], own)
    assert evaluator.additive == ("cross_entropy",)


def test_known_values() -> None:
    counts = [(1, 2, 1), (0, 0, 0), (1, 2, 3)]
    values = {}
    for metric, pool in SPAN_SCORES.items():
        own, *parts = span_parts(metric, counts).values()
        values[metric] = pool(parts)
        assert own.shape == (3,)
        assert own[1] == 0
    assert values == {"span_f1": 2 * 2 / 8, "span_precision": 2 / 4, "span_recall": 2 / 4}


class TestRefused:
    def test_a_missing_library(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libraries, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"seqeval.*pip install 'mergesearch\[spans\]'"):
            build(section(folder)).check()

    def test_classes_that_are_no_tags(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libraries, "find_spec", lambda name: name)
        check_spans({"": NAMES, "news": ["O", "B", "S-LOC"]}, "evaluators.0")
        for name in ("noun", "BX", "0", "X-B"):
            with pytest.raises(InputError, match=f"O, B-PER and I-PER .*, received '{name}'"):
                check_spans({"": [*NAMES, name]}, "evaluators.0")

    def test_numbers_without_names(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libraries, "find_spec", lambda name: name)
        with pytest.raises(InputError, match=r"found only numbers; list them in data\.classes"):
            build(section(folder, classes=None)).check()

    def test_a_model_with_more_classes(self, folder: Path) -> None:
        pytest.importorskip("seqeval")
        model = pico_bert("token", num_labels=CLASSES + 9)
        with pytest.raises(InputError, match="expected names of all classes of the model, rec"):
            opened(section(folder)).evaluate(candidate_at([0.0], model), "search")


def test_names_of_tags_are_numbered(folder: Path, tmp_path: Path) -> None:
    """Tags may be names in the file; ``data.classes`` numbers them."""
    pytest.importorskip("seqeval")
    rows = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    named = [row | {"tags": [NAMES[number] for number in row["tags"]]} for row in rows]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in named))
    model = pico_bert("token")
    values = [
        opened(section(folder, file=str(place / "texts.jsonl")))
        .evaluate(candidate_at([0.0], model), "search")
        .values
        for place in (folder, tmp_path)
    ]
    assert values[0] == values[1]
