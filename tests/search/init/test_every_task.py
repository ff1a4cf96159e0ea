"""What ``init`` proposes for models that see, hear, answer and embed, up to a check that passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.architectures.catalogue import ARCHITECTURES
from tests.architectures.evaluations import sections_of
from tests.architectures.trial import make_family
from tests.search.cli.test_cli import mergesearch
from tests.search.init.journeys import write_lines

MODELS = ("base", "left", "right")
#: Architecture -> kind of the items that are made for it, and what the study says of them.
PROPOSED: dict[str, tuple[str, dict[str, Any]]] = {
    "sam": (
        "segmentation",
        {"inputs": {"pixel_values": "pixel_values", "input_boxes": "input_boxes"}, "mask": "mask"},
    ),
    "segformer": ("segmentation", {"inputs": {"pixel_values": "pixel_values"}, "background": 0}),
    "wav2vec2": ("speech_recognition", {"inputs": {"input_values": "input_values"}}),
    "whisper": ("speech_recognition", {"model_class": "AutoModelForSpeechSeq2Seq"}),
    "llava": ("visual_questions", {"question": "question", "answer": "answer"}),
    "blip2": ("visual_questions", {"prompt": "Question: {} Answer:"}),
    "mpnet": ("retrieval", {"query": "query", "document": "document"}),
    "albert": ("similarity", {"text": "text", "pair": "pair", "number": "score"}),
    "qwen2_reward": ("reward", {"chosen": "chosen", "rejected": "rejected"}),
}
#: Whose processors have no chat template, although the tests write one beside them.
UNTEMPLATED = ("blip2",)
QUICK = ("wav2vec2", "llava", "mpnet")
CASES = [
    pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow,)) for name in PROPOSED
]


def made(name: str, folder: Path) -> Path:
    """Models of an architecture in a folder, and the items that are made for its kind."""
    make_family(ARCHITECTURES[name], folder)
    [section] = sections_of(name, folder)
    if name in UNTEMPLATED:
        (folder / "base" / "chat_template.jinja").unlink()
    return Path(section["data"])


def init(folder: Path, data: Path, *options: object) -> tuple[int, str, str]:
    models = [folder / name for name in MODELS]
    return mergesearch("init", *models, "--data", data, "--out", folder / "study.yaml", *options)


@pytest.mark.parametrize("name", CASES)
def test_what_init_writes_passes_its_check(name: str, tmp_path: Path) -> None:
    kind, wanted = PROPOSED[name]
    code, _, err = init(tmp_path, made(name, tmp_path), "--no-measure")
    assert code == 0, err
    [section] = yaml.safe_load((tmp_path / "study.yaml").read_text())["evaluators"]
    assert section["kind"] == kind
    assert section["domain"] == "domain"
    assert section | wanted == section
    code, out, err = mergesearch("check", tmp_path / "study.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["items"] == {"search": 6, "validation": 4, "test": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPOSED)
def test_a_trial_of_what_init_writes_is_timed(name: str, tmp_path: Path) -> None:
    code, out, err = init(tmp_path, made(name, tmp_path), "--minutes", 0.01)
    assert code == 0, err
    assert "s a trial" in out


class TestRefusals:
    def test_an_encoder_and_texts_without_pairs(self, tmp_path: Path) -> None:
        made("mpnet", tmp_path)
        data = write_lines(tmp_path / "texts.jsonl", [{"text": "a cat"}, {"text": "a dog"}])
        code, _, err = init(tmp_path, data, "--no-measure")
        assert code == 2
        assert "expected a column of queries and one of their documents" in err
        assert "--column query=NAME" in err

    @pytest.mark.slow
    def test_a_promptable_model_without_boxes(self, tmp_path: Path) -> None:
        made("sam", tmp_path)
        rows = [{"image": [[[0.5] * 16] * 16] * 3, "mask": [[0] * 16] * 16} for _ in range(3)]
        data = write_lines(tmp_path / "pictures.jsonl", rows)
        code, _, err = init(tmp_path, data, "--no-measure")
        assert code == 2
        assert "expected a column of boxes (or points)" in err
