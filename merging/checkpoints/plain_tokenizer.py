"""Tokenizers that transformers surely loads, told from their files.

Loading one imports transformers and torch, which takes seconds; a check of a study needs only to
know that it will work. A folder with a file ``tokenizer.json`` that the library of tokenizers
reads, of the class that wraps such files, with nothing but settings of known names and types
beside it, does. Of any other folder nothing is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.json_text import read_json
from mergesearch.merging.foreign.paths import is_file

#: Files of such a folder.
VOCABULARY = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
#: Names of the class that wraps a ``tokenizer.json`` of any kind.
CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


def _is_token(value: Any) -> bool:
    """Whether a value is a token, or none: its text, or its text and flags."""
    if isinstance(value, dict):
        flags = {name: held for name, held in value.items() if name not in ("content", "__type")}
        return isinstance(value.get("content"), str) and all(
            isinstance(held, bool) for held in flags.values()
        )
    return value is None or isinstance(value, str)


def _are_numbered(value: Any) -> bool:
    """Whether a value maps numbers of tokens, as digits, to tokens."""
    return isinstance(value, dict) and all(
        key.isascii() and key.isdigit() and isinstance(token, dict) and _is_token(token)
        for key, token in value.items()
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_length(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
#: Setting -> whether a value is one that the class takes.
_KNOWN: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys((f"{name}_token" for name in _TOKENS), _is_token),
    "added_tokens_decoder": _are_numbered,
    "backend": lambda value: value == "tokenizers",
    "chat_template": lambda value: isinstance(value, str),
    "clean_up_tokenization_spaces": lambda value: isinstance(value, bool),
    "model_input_names": _are_texts,
    "model_max_length": _is_length,
    "padding_side": lambda value: value in ("left", "right"),
    "tokenizer_class": lambda value: value in CLASSES,
    "truncation_side": lambda value: value in ("left", "right"),
}


@dataclass(frozen=True)
class PlainTokenizer:
    """A tokenizer that transformers surely loads.

    Attributes:
        chat_template: Whether it has one.
    """

    chat_template: bool


def plain_tokenizer(folder: Path | None) -> PlainTokenizer | None:
    """What the files of a folder say of its tokenizer; None where it must be loaded to know."""
    if folder is None or not all(is_file(folder / name) for name in (VOCABULARY, SETTINGS)):
        return None
    try:
        settings = read_json(folder / SETTINGS)
        config = read_json(folder / "config.json")
    except InputError:
        return None
    if not isinstance(settings, dict) or not isinstance(config, dict):
        return None
    plain = "tokenizer_class" in settings and all(
        name in _KNOWN and _KNOWN[name](value) for name, value in settings.items()
    )
    if not plain or not isinstance(config.get("model_type"), str) or not _reads(folder):
        return None
    return PlainTokenizer(bool(settings.get("chat_template")) or is_file(folder / TEMPLATE))


def _reads(folder: Path) -> bool:
    """Whether the library of tokenizers reads the vocabulary."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(folder / VOCABULARY))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        return False  # loading says why
    return True
