"""Tokenizers of folders, with their words.

Without the files of a vocabulary, transformers makes tokenizers of most types all the same, to
which every word is unknown; such a folder is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergesearch.merging.errors import InputError

#: Files that hold a vocabulary under other names than a tokenizer's class lists.
_OTHER_FILES = ("tokenizer.*json", "*vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")
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
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        if folder is not None and not _files(folder):
            raise InputError(f"{where}: {WORDLESS}") from None
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: expected a tokenizer, received {type(error).__name__}: {reason}"
        ) from None
    check_words(tokenizer, folder, where)
    return tokenizer


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
