"""Texts as tokens, with the characters that each of them covers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import InputError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tokenized:
    """The tokens of a text.

    Attributes:
        ids: Of the vocabulary ``(tokens,)``.
        ends: Number of characters other than white space up to the end of each token ``(tokens,)``.
            White space does not count, for tokenizers differ in the token that they give it to.
    """

    ids: Ids
    ends: Ids


def check_fast(tokenizer: Any, where: str) -> None:
    """Refuse a tokenizer that does not know which characters its tokens cover.

    Raises:
        InputError: In one line.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{where}: expected a tokenizer that tells the place of its tokens, received "
            f"{type(tokenizer).__name__}; save it as tokenizer.json"
        )


def first_token(tokenizer: Any, where: str) -> int:
    """The token that stands before a text.

    Raises:
        InputError: If the tokenizer has none that could.
    """
    names = ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id")
    found = next((getattr(tokenizer, n) for n in names if getattr(tokenizer, n) is not None), None)
    if found is None:
        raise InputError(
            f"{where}: expected a tokenizer with a first token, found neither bos, cls, eos nor "
            "pad; name one in tokenizer_config.json"
        )
    return int(found)


def tokenize(tokenizer: Any, text: str, most: int) -> Tokenized:
    """The first ``most`` tokens of a text, without special ones."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counts = [0, *accumulate(not letter.isspace() for letter in text)]
    ends = [counts[stop] for _, stop in found["offset_mapping"]]
    # A token never ends before the one that stands before it.
    rising = np.maximum.accumulate(np.array(ends, dtype=np.int64)) if ends else np.zeros(0, int)
    ids = np.array(found["input_ids"], dtype=np.int64)
    return Tokenized(ids[:most], rising[:most].astype(np.int64))


def token_texts(tokenizer: Any) -> list[str]:
    """The text that every token of the vocabulary stands for, spaces included, by its number.

    Special tokens, and numbers that no token has, stand for "".
    """
    words: Mapping[str, int] = tokenizer.get_vocab()
    read = _READERS.get(_decoder(tokenizer), _as_metaspace)
    special = set(tokenizer.all_special_ids)
    texts = [""] * (1 + max(words.values()))
    for word, number in words.items():
        if number not in special:
            texts[number] = read(tokenizer, word)
    return texts


def _decoder(tokenizer: Any) -> str:
    """How a tokenizer writes spaces: the first decoder of its list that says so."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    listed = [decoder, *decoder.get("decoders", [])]
    return next((one["type"] for one in listed if one.get("type") in _READERS), "")


def _as_bytes(tokenizer: Any, word: str) -> str:
    """Of a byte-level vocabulary, where Ġ is a space and other letters are bytes."""
    from tokenizers.decoders import ByteLevel

    return str(ByteLevel().decode([word]))


def _as_metaspace(tokenizer: Any, word: str) -> str:
    """Of a vocabulary in which ▁ is a space."""
    return word.replace("▁", " ")


def _as_pieces(tokenizer: Any, word: str) -> str:
    """Of a vocabulary in which ## goes on with a word."""
    return word.removeprefix("##") if word.startswith("##") else f" {word}"


#: Decoder -> what reads a token.
_READERS: Mapping[str, Callable[[Any, str], str]] = {
    "ByteLevel": _as_bytes,
    "Metaspace": _as_metaspace,
    "WordPiece": _as_pieces,
}
