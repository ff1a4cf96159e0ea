"""Loads tokenizers once, and compares those of base and experts.

Other tokens or another chat template make other prompts, and so other scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from mergesearch.evaluators.data.pretrained import checkpoint_folder
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.plain_tokenizer import plain_tokenizer
from mergesearch.merging.checkpoints.tokenizer_folder import TOKENIZER_LIMIT, tokenizer_in
from mergesearch.merging.foreign.json_text import parse_json, read_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.reading import decode, read_bytes, read_text
from mergesearch.merging.foreign.shown import path_shown

#: Files that say how text becomes tokens.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@cache
def load_tokenizer(path: str, where: str) -> Any:
    """Load the tokenizer of a folder or ``org/name@revision``.

    Raises:
        InputError: If there is none.
    """
    return tokenizer_in(checkpoint_folder(path, where), f"{where}: {path}")


def check_tokenizer(path: str, where: str, *, template: bool = False) -> bool:
    """Check that a tokenizer can be loaded, from its files alone where these say enough.

    Args:
        path: Folder, or ``org/name@revision``.
        where: Key of the study file, for messages.
        template: Whether a chat template is asked about.

    Returns:
        Whether it has a chat template, if that is asked.

    Raises:
        InputError: If there is no tokenizer.
    """
    plain = plain_tokenizer(checkpoint_folder(path, where))
    if plain is not None and (plain.chat_template or not template):
        return plain.chat_template
    return bool(getattr(load_tokenizer(path, where), "chat_template", None))


def parent_warnings(sources: Sequence[str], *, templates: bool) -> list[str]:
    """Warnings about experts whose vocabulary or chat template is not the base's.

    Args:
        sources: Folders of base and experts; those without a tokenizer are skipped.
        templates: Whether prompts are made by chat templates.
    """
    base, *experts = (_folder(source) for source in sources)
    lines = []
    for kind, read in (("tokenizer", _vocabulary), ("chat template", _template)):
        own = None if base is None else read(base)
        odd = [
            str(folder)
            for folder in experts
            if folder is not None and read(folder) not in (None, own)
        ]
        if odd and (own is not None or kind == "chat template"):
            use = "" if kind == "tokenizer" or templates else " (prompts here use none)"
            lines.append(
                f"the {kind} of {', '.join(odd)} differs from that of the base {base}{use}; the "
                "base's is used"
            )
    return lines


def _folder(source: str) -> Path | None:
    """Folder of a checkpoint on disk."""
    folder = open_checkpoint(source).folder
    return None if folder is None else Path(folder)


def _vocabulary(folder: Path) -> str | None:
    """Hash of the tokens and merges, without the rest of the file."""
    file = next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)
    if file is None:
        return None
    content = read_bytes(file, TOKENIZER_LIMIT)
    if file.name == "tokenizer.json":
        return _model_hash(_TokenizerJson(content, path_shown(file)))
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class _TokenizerJson:
    """A file ``tokenizer.json``; copies of it are equal, wherever they are."""

    content: bytes
    where: str = field(compare=False)


@lru_cache(maxsize=1)  # most experts have copies of the base's, of up to 40 MB
def _model_hash(file: _TokenizerJson) -> str:
    """Hash of the model in the file."""
    data = Node(parse_json(decode(file.content, file.where), file.where), file.where)
    return hashlib.sha256(json.dumps(data.get("model").value, sort_keys=True).encode()).hexdigest()


def _template(folder: Path) -> str | None:
    """The chat template, from its own file or the tokenizer's settings."""
    own = folder / "chat_template.jinja"
    settings = folder / "tokenizer_config.json"
    if own.is_file():
        return read_text(own)
    if not settings.is_file():
        return None
    template = Node(read_json(settings), path_shown(settings)).get("chat_template").value
    return None if template is None else json.dumps(template, sort_keys=True)
