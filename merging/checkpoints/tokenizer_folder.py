"""Tokenizers of folders, with their words.

Without the files of a vocabulary, transformers makes tokenizers of most types all the same, to
which every word is unknown; such a folder is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.safetensors_files import read_json
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.extensions.heavy_imports import fast_imports
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.paths import is_file
from mergesearch.merging.foreign.shown import path_shown, shown

#: Files that hold a vocabulary under other names than a tokenizer's class lists.
_OTHER_FILES = ("tokenizer.*json", "*vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")
SETTINGS = "tokenizer_config.json"
#: The largest file of a tokenizer, in bytes; real ones have up to 40 MB.
TOKENIZER_LIMIT = 1 << 29
WORDLESS = (
    "expected a tokenizer with its vocabulary, such as tokenizer.json, found none; copy the "
    "tokenizer's files there, or name another folder as the tokenizer"
)


def tokenizer_in(folder: Path | None, where: str) -> Any:
    """The tokenizer of a folder; its code is not run.

    Args:
        folder: Where it is.
        where: Key of the study file, and path, for messages.

    Raises:
        InputError: If there is none.
    """
    with fast_imports():
        from transformers import AutoTokenizer

    try:
        check_settings(folder)
        with library_errors(where, "a tokenizer"), fast_imports():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except InputError:
        if folder is not None and not _files(folder):
            raise InputError(f"{where}: {WORDLESS}") from None
        raise
    check_words(tokenizer, folder, where)
    return tokenizer


def check_settings(folder: Path | None) -> None:
    """Refuse settings of a tokenizer whose keys its library would print as they are.

    Raises:
        CheckpointError: If ``tokenizer_config.json`` cannot be read, or has a key that is not
            printable.
    """
    if folder is None or not is_file(folder / SETTINGS):
        return
    waiting: list[Any] = [read_json(folder / SETTINGS)]
    while waiting:
        held = waiting.pop()
        for key in held if isinstance(held, dict) else ():
            if not key.isprintable():
                raise CheckpointError(
                    f"{path_shown(folder / SETTINGS)}: expected keys that can be printed, received "
                    f"{shown(key)}"
                )
        if isinstance(held, dict | list):
            waiting += held.values() if isinstance(held, dict) else held


def check_words(tokenizer: Any, folder: Path | None, where: str) -> None:
    """Refuse a tokenizer whose folder lacks the vocabulary that its class reads.

    Args:
        tokenizer: As transformers loads it; one of bytes has no vocabulary, and passes.
        folder: Where it was loaded from.
        where: Key of the study file, and path, for messages.

    Raises:
        InputError: In one line.
    """
    listed = {*(getattr(tokenizer, "vocab_files_names", None) or {}).values()}
    wanted = listed - {"tokenizer_config.json"}
    if folder is None or not wanted or any((folder / name).is_file() for name in wanted):
        return
    if not _files(folder):
        raise InputError(f"{where}: {WORDLESS}")


def _files(folder: Path) -> list[Path]:
    return [file for pattern in _OTHER_FILES for file in folder.glob(pattern)]
