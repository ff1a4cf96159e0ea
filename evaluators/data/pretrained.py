"""What checkpoints hold beside their weights, found and loaded from disk alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergesearch.merging.foreign.library import library_errors

#: Files of which a folder with a tokenizer or a processor has one.
_PROCESSORS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def checkpoint_folder(checkpoint: str, where: str) -> Path | None:
    """The folder of a checkpoint, which may hold a processor or a configuration alone.

    That of an adapter is its model's, unless it has a tokenizer or a processor itself.
    """
    from mergesearch.merging.checkpoints.adapter_files import is_adapter
    from mergesearch.merging.checkpoints.opening import open_checkpoint

    path = Path(checkpoint)
    alone = any((path / name).is_file() for name in _PROCESSORS)
    if path.is_dir() and (alone or not is_adapter(path)):
        return path
    folder = open_checkpoint(checkpoint, where).folder
    return None if folder is None else Path(folder)


def checkpoint_config(checkpoint: str, where: str) -> Mapping[str, Any]:
    """The ``config.json`` of a checkpoint, ``{}`` where it has none; an adapter's names its head's.

    Args:
        checkpoint: Folder or other path of a checkpoint; a folder need not hold weights.
        where: Name of the checkpoint in messages.
    """
    from mergesearch.merging.checkpoints.adapter_files import is_adapter
    from mergesearch.merging.checkpoints.model_config import read_config
    from mergesearch.merging.checkpoints.opening import open_checkpoint

    path = Path(checkpoint)
    if not path.is_dir() or is_adapter(path):
        return open_checkpoint(checkpoint, where).config
    return read_config(path)


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
    with library_errors(where, what):
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
