"""The tokens of a model folder: which row of its embeddings belongs to which string."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.safetensors_files import read_json
from mergesearch.merging.errors import CheckpointError

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
    try:
        return Tokenizer.from_file(str(file)) if file.is_file() else _converted(folder)
    except Exception as error:  # the library raises bare exceptions
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{folder}: expected a tokenizer that can be read, received: {reason}"
        ) from None


def _converted(folder: Path) -> Any:
    from transformers import AutoTokenizer

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
    plain_tokens = {
        int(row): {"content": token}
        for token, row in (read_json(plain) if plain.is_file() else {}).items()
    }
    listed = read_json(config).get("added_tokens_decoder") or {} if config.is_file() else {}
    return plain_tokens | {int(row): entry for row, entry in listed.items()}
