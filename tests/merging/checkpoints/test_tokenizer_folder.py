"""Folders without a vocabulary are refused; transformers would make a tokenizer of no words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.tokenizer_folder import tokenizer_in

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]


def folder_of(path: Path, model_type: str, **files: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


@pytest.mark.parametrize(
    ("model_type", "files"),
    [
        ("bert", {}),
        ("bert", {"tokenizer_config__json": '{"tokenizer_class": "BertTokenizer"}'}),
        ("clip", {}),
        ("wav2vec2", {}),
        ("qwen2", {"added_tokens__json": '{"<image>": 5}'}),
    ],
)
def test_no_words(model_type: str, files: dict[str, str], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", model_type, **files)
    with pytest.raises(InputError, match=r"key: expected a tokenizer with its vocab.*found none"):
        tokenizer_in(folder, "key")


def test_words_and_bytes(tmp_path: Path) -> None:
    words = folder_of(tmp_path / "words", "bert", vocab__txt="\n".join(WORDS))
    assert tokenizer_in(words, "key")("good").input_ids == [2, 5, 3]
    settings = '{"tokenizer_class": "ByT5Tokenizer"}'
    of_bytes = folder_of(tmp_path / "bytes", "t5", tokenizer_config__json=settings)
    assert tokenizer_in(of_bytes, "key")("a").input_ids[0] == ord("a") + 3


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="key: expected a tokenizer, received"):
        tokenizer_in(folder_of(tmp_path / "model", "bert", tokenizer__json="{"), "key")


def test_settings_with_keys_that_cannot_be_printed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": [{"a\\u001b[2J": 1}]}')
    with pytest.raises(InputError, match=r"keys that can be printed, received 'a\\x1b\[2J'"):
        tokenizer_in(tmp_path, "tokenizer")
