"""What checkpoints hold beside their weights, found and loaded from disk alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergesearch.merging import InputError


def checkpoint_folder(checkpoint: str, where: str) -> Path | None:
    """The folder of a checkpoint, which may hold a processor or a configuration alone."""
    from mergesearch.merging.checkpoints.opening import open_checkpoint

    path = Path(checkpoint)
    if path.is_dir():
        return path
    folder = open_checkpoint(checkpoint, where).folder
    return None if folder is None else Path(folder)


def load_pretrained(kind: Any, folder: Path | None, what: str, where: str) -> Any:
    """Load a tokenizer or a processor of a folder; its code is not run.

    Args:
        kind: Auto class of ``transformers``.
        folder: Where it is.
        what: What is loaded, for messages.
        where: Key of the study file and path, for messages.

    Raises:
        InputError: If there is none.
    """
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: expected {what}, received {type(error).__name__}: {text}"
        ) from None
