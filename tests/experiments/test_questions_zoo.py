"""The questions zoo: it trains on what the evaluator reads, and experts change blocks alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.zoo import questions
from experiments.zoo.clip_data import CLASSES, make_items
from experiments.zoo.digits import Training
from experiments.zoo.questions_data import (
    QUESTIONS,
    answer_tokens,
    as_stored,
    asked_tokens,
    make_processor,
    save_rows,
)
from mergesearch.merging.checkpoints.opening import open_checkpoint
from tests.evaluators.items import opened

SIZES = {"search": 2, "validation": 2, "test": 3, "training": 20}
BRIEF = Training(steps=2, rate=1e-3, batch=4)


def test_training_and_evaluator_read_the_same(tmp_path: Path) -> None:
    items = make_items(SIZES, 0)
    processor = make_processor()
    processor.save_pretrained(tmp_path / "base")
    save_rows(tmp_path / "data", items)
    evaluator = opened(questions.section(tmp_path) | {"tokenizer": str(tmp_path / "base")})
    place = torch.nn.Linear(1, 1)  # all that is asked of a model here is where it is
    read = evaluator._items["test"]  # type: ignore[attr-defined]
    stored = as_stored(items["test"])
    for task in QUESTIONS:
        images, labels = stored[task]
        rows = [index for index, own in enumerate(read.domains) if own == task]
        assert len(rows) == len(images)
        for index, image, label in zip(rows, images, labels, strict=True):
            assert read.answers[index] == [CLASSES[task][label]]
            batch = evaluator._read_by(place, read.rows(np.array([index])))  # type: ignore[attr-defined]
            assert batch["input_ids"][0].tolist() == asked_tokens(processor, task)
            torch.testing.assert_close(
                batch["pixel_values"][0], torch.from_numpy(image), atol=1e-5, rtol=0
            )
        assert processor.tokenizer.unk_token_id not in answer_tokens(processor, task)


@pytest.mark.slow
def test_experts_change_matrices_of_blocks_alone(tmp_path: Path) -> None:
    settings = questions.Settings(base=BRIEF, expert=BRIEF, items=SIZES)
    zoo = questions.build_questions(tmp_path / "zoo", settings)
    before = (zoo / "manifest.json").stat().st_mtime_ns
    questions.build_questions(zoo, settings)
    assert (zoo / "manifest.json").stat().st_mtime_ns == before
    base = open_checkpoint(str(zoo / "base"))
    for task in QUESTIONS:
        expert = open_checkpoint(str(zoo / task))
        changed = {name for name in base.tensors if (base.read(name) != expert.read(name)).any()}
        inside = {name for name in base.tensors if questions.is_tuned(name)}
        assert changed == inside
        assert len(inside) == 4 * 7
