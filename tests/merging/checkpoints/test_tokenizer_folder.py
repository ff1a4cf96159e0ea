"""Folders without a vocabulary are refused; transformers would make a tokenizer of no words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.plain_tokenizer import plain_tokenizer
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


PLAIN: dict[str, Any] = {"tokenizer_class": "TokenizersBackend", "unk_token": "[UNK]"}


def of_words(path: Path, settings: dict[str, Any], **files: Any) -> Path:
    """A folder with a ``tokenizer.json`` of a few words and these settings."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    written = {
        "tokenizer__json": tokenizer.to_str(),
        "tokenizer_config__json": json.dumps(settings),
    }
    return folder_of(path, "llama", **{**written, **files})


@pytest.mark.parametrize(
    ("settings", "template"),
    [
        (PLAIN, False),
        ({**PLAIN, "tokenizer_class": "PreTrainedTokenizerFast"}, False),
        ({**PLAIN, "chat_template": "{{ messages }}"}, True),
        (
            {**PLAIN, "pad_token": {"content": "[PAD]", "lstrip": False, "__type": "AddedToken"}},
            False,
        ),
        ({**PLAIN, "model_max_length": 1e30, "padding_side": "left", "mask_token": None}, False),
        ({**PLAIN, "added_tokens_decoder": {"7": {"content": "<x>", "special": True}}}, False),
    ],
)
def test_what_files_say_of_a_tokenizer_is_what_loading_says(
    settings: dict[str, Any], template: bool, tmp_path: Path
) -> None:
    folder = of_words(tmp_path / "model", settings)
    plain = plain_tokenizer(folder)
    assert plain is not None
    loaded = tokenizer_in(folder, "key")
    assert loaded("good bad").input_ids == [5, 6]
    assert plain.chat_template is bool(loaded.chat_template) is template


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({}, {}),
        ({**PLAIN, "tokenizer_class": "BertTokenizer"}, {}),
        ({**PLAIN, "unk_token": 5}, {}),
        ({**PLAIN, "model_max_length": "long"}, {}),
        ({**PLAIN, "added_tokens_decoder": {"x": {"content": "<x>"}}}, {}),
        ({**PLAIN, "auto_map": {"AutoTokenizer": ["code.Own", None]}}, {}),
        (PLAIN, {"config__json": "[]"}),
        (PLAIN, {"config__json": "{"}),
        (PLAIN, {"tokenizer__json": "{}"}),
        (PLAIN, {"tokenizer__json": "\udc80".encode("utf-8", "surrogatepass").decode("latin1")}),
    ],
)
def test_nothing_is_said_of_other_tokenizers(
    settings: dict[str, Any], files: dict[str, str], tmp_path: Path
) -> None:
    assert plain_tokenizer(of_words(tmp_path / "model", settings, **files)) is None
    assert plain_tokenizer(tmp_path / "absent") is None
    assert plain_tokenizer(None) is None


def test_a_plain_tokenizer_is_checked_without_transformers(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mergesearch.evaluators.text.tokenizers import check_tokenizer\n"
        "assert not check_tokenizer(sys.argv[1], 'key')\n"
        "assert not {'torch', 'transformers', 'datasets'} & {*sys.modules}\n"
    )
    folder = of_words(tmp_path / "model", PLAIN)
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
