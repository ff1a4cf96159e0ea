"""The tokenizer of a model folder as GGUF has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.safetensors_files import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6


def add_tokenizer(writer: GGUFWriter, folder: Path, size: int, pre: str) -> str | None:
    """Add the tokens, merges and special tokens of a folder with ``tokenizer.json``.

    Tokens that were BPE of bytes become ``gpt2``, those of BPE with bytes as a fallback ``llama``,
    whose scores then are the order of the tokens, as SentencePiece gives them to BPE.

    Args:
        writer: Of the file.
        folder: Of the model.
        size: Rows of the embeddings.
        pre: How llama.cpp splits texts.

    Returns:
        Why there is no tokenizer, or None.
    """
    from gguf import SpecialVocab

    file = folder / "tokenizer.json"
    data = read_json(file) if file.is_file() else {}
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        writer.add_tokenizer_model("none")
        kind = f"one of type {model.get('type')!r}" if data else "no tokenizer.json"
        return f"expected a tokenizer of type 'BPE', received {kind}"
    tokens, types = _tokens(model["vocab"], data.get("added_tokens") or [], size)
    by_bytes = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if by_bytes else "gpt2")
    writer.add_tokenizer_pre("default" if by_bytes else pre)
    writer.add_token_list(tokens)
    if by_bytes:
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types(types)
    SpecialVocab(folder, load_merges=not by_bytes, n_vocab=size).add_to_gguf(writer, quiet=True)
    return None


def _tokens(
    vocabulary: Mapping[str, int], added: list[dict[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embeddings; rows without a token are unused."""
    kinds = {
        token["content"]: _CONTROL if token.get("special") else _USER_DEFINED for token in added
    }
    numbers = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    by_number = {number: text for text, number in numbers.items()}
    texts = [by_number.get(number, f"[PAD{number}]") for number in range(size)]
    types = [
        _UNUSED if number not in by_number else kinds.get(text, _kind(text))
        for number, text in enumerate(texts)
    ]
    return texts, types


def _kind(text: str) -> int:
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return _BYTE if is_byte else _NORMAL
