"""The tokens of a model folder: which row of its embeddings belongs to which string."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.safetensors_files import read_json
from mergesearch.merging.checkpoints.tokenizer_folder import check_settings
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import path_shown

#: What a tokenizer file says of a token that is not one of its model's.
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one source.

    Attributes:
        rows: Token string -> row.
        added: Token string -> flags, for tokens added to the tokenizer's model.
    """

    rows: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]]

    @property
    def top(self) -> int:
        """One past the last row that has a token."""
        return max(self.rows.values(), default=-1) + 1


def read_tokens(folder: Path) -> Tokens:
    """The tokens of a model folder.

    They come from ``tokenizer.json`` or, without one, from the tokenizer that transformers reads.

    Nothing is downloaded and no code of the folder is run.

    Raises:
        CheckpointError: If there is no tokenizer, or it cannot be read.
    """
    files = [
        folder / name for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    ]
    return _read_tokens(
        folder, tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)
    )


@lru_cache(maxsize=16)
def _read_tokens(folder: Path, _changed: tuple[int, ...]) -> Tokens:
    tokenizer = load_tokenizer(folder)
    rows = tokenizer.get_vocab(with_added_tokens=True)
    added = {
        t.content: {f: getattr(t, f) for f in _FLAGS}
        for t in tokenizer.get_added_tokens_decoder().values()
    }
    for row, entry in sorted(_tokens_beside(folder).items()):
        if entry["content"] not in rows:
            rows[entry["content"]] = row
            added[entry["content"]] = {flag: bool(entry.get(flag, False)) for flag in _FLAGS}
    return Tokens(rows, added)


def load_tokenizer(folder: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a model folder.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    with library_errors(path_shown(folder), "a tokenizer that can be read", CheckpointError):
        return Tokenizer.from_file(str(file)) if file.is_file() else _converted(folder)


def _converted(folder: Path) -> Any:
    from transformers import AutoTokenizer

    check_settings(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("a tokenizer that has no tokenizer.json and cannot be converted to one")
    return backend


def _tokens_beside(folder: Path) -> dict[int, dict[str, Any]]:
    """Tokens that files beside ``tokenizer.json`` add: row -> content and flags."""
    config = folder / "tokenizer_config.json"
    plain = folder / "added_tokens.json"
    added = Node(read_json(plain) if plain.is_file() else {}, path_shown(plain), CheckpointError)
    plain_tokens = {_row(row): {"content": token} for token, row in added.members()}
    settings = read_json(config) if config.is_file() else {}
    whole = Node(settings, path_shown(config), CheckpointError)
    if not whole.has("added_tokens_decoder"):
        return plain_tokens
    listed = whole.get("added_tokens_decoder").members()
    return plain_tokens | {_row(Node(row, e.where, e.error)): _entry(e) for row, e in listed}


def _row(node: Node) -> int:
    """The row of a token: a number, or its digits as keys of JSON have them."""
    text = node.value
    digits = isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 12
    return Node(int(text) if digits else text, node.where, node.error).integer(below=1 << 32)


def _entry(node: Node) -> dict[str, Any]:
    """Content and flags of a token."""
    node.at("content").text()
    return node.mapping()
