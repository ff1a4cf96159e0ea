"""Questions about pictures: answers are those of a plain call, and are judged as people would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.evaluators.data.pictures import opened_picture
from mergesearch.evaluators.images import questions
from mergesearch.evaluators.images.questions import agreement
from mergesearch.evaluators.spec.evaluators import parse_evaluators
from mergesearch.merging import InputError
from tests.evaluators.answered import pico_llava, question_folder
from tests.evaluators.items import build, candidate_at, opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return question_folder(tmp_path_factory.mktemp("questions"))


def section(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "kind": "visual_questions",
        "data": str(folder / "questions.parquet"),
        "tokenizer": str(folder / "processor"),
        "answer": "answer",
        "id": "id",
        "max_new_tokens": 4,
        **options,
    }


def test_answers_are_those_of_a_plain_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    model = pico_llava()
    evaluator = opened(section(folder, batch_size=5, instruction="say"))
    heard: list[str] = []
    monkeypatch.setattr(
        questions, "agreement", lambda text, wanted: float(bool(heard.append(text)) or len(wanted))
    )
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    assert measured.values["accuracy"] == 1
    items = evaluator._items["search"]  # type: ignore[attr-defined]
    processor = AutoProcessor.from_pretrained(folder / "processor")
    for index, question in enumerate(items.questions):
        batch = processor(
            text=[f"<image>{question} say"],
            images=[opened_picture(items.pictures[index])],
            return_tensors="pt",
        )
        with torch.no_grad():
            rows = model.generate(**batch, max_new_tokens=4, do_sample=False)
        new = rows[0, batch["input_ids"].shape[1] :]
        assert heard[index] == processor.tokenizer.decode(new, skip_special_tokens=True)
    assert len(set(heard)) > 1


def test_agreement() -> None:
    assert agreement("The RED!", ["red"]) == 1
    assert agreement("blue", ["red", "blue"]) == 1
    assert agreement("red", ["red", "Red.", "a red", "blue"]) == 1
    assert agreement("blue", ["red", "Red.", "a red", "blue"]) == pytest.approx(1 / 3)
    assert agreement("green", ["red"]) == 0


def test_several_answers(folder: Path) -> None:
    evaluator = opened(section(folder, answer=None, answers="people"))
    assert evaluator._items["test"].answers[0] == ["red", "Red.", "a red", "blue"]  # type: ignore[attr-defined]


def test_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a column of answer or of answers"):
        parse_evaluators([section(folder, answers="people")])
    with pytest.raises(InputError, match=r"a preprocessor_config\.json for pictures"):
        build(section(folder, tokenizer=None)).check()
    with pytest.raises(InputError, match="expected lists of texts in column 'answer'"):
        build(section(folder, answer=None, answers="answer")).check()
