"""Paths of checkpoints: local folders and files, names of the hub, and ``MODEL+ADAPTER``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mergesearch.merging.checkpoints.safetensors_files import COMPANIONS, INDEX
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.paths import exists, expanded
from mergesearch.merging.foreign.shown import name_shown, path_shown

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_HUB_FILES = ("*.safetensors", INDEX, *COMPANIONS, "README.md", "adapter_config.json")
_HUB_SKIPPED = ("*/*.safetensors", "consolidated*.safetensors")


def split_path(path: str, folder: Path | None = None) -> tuple[str, str] | None:
    """Model and adapter of ``MODEL+ADAPTER``.

    None for any other path, also for one that exists with a + in its name.

    Args:
        path: As given to :meth:`Checkpoint.open`.
        folder: Where relative paths start; the working directory if it is None.
    """
    if "+" not in path or _exists(path, folder):
        return None
    pluses = [index for index, letter in enumerate(path) if letter == "+"]
    pairs = [(path[:index], path[index + 1 :]) for index in reversed(pluses)]
    # Folders may have a + in their names: the last split of which both parts are something, else
    # the last.
    return next(
        (p for p in pairs if all(_exists(part, folder) or is_hub_name(part) for part in p)),
        pairs[0],
    )


def absolute_path(path: str, folder: Path) -> str:
    """The path with its local parts, which start at ``folder``, made absolute.

    Names of the hub and missing paths stay as they are.
    """
    parts = split_path(path, folder)
    if parts is not None:
        return "+".join(absolute_path(part, folder) for part in parts)
    return os.path.abspath(folder / expanded(path)) if path and _exists(path, folder) else path


def _exists(path: str, folder: Path | None) -> bool:
    return exists((folder or Path()) / expanded(path))


def is_hub_name(path: str) -> bool:
    """Whether ``path`` reads as ``org/name`` or ``org/name@revision``."""
    return _HUB_NAME.fullmatch(path) is not None


def short_name(path: str) -> str:
    """Name for tables: the folder or file name, or the hub name without organisation and revision.

    A model with an adapter goes by the adapter.
    """
    _, path = split_path(path) or ("", path)
    if is_hub_name(path) and not exists(Path(path)):
        path = path.split("@")[0]
    return Path(os.path.abspath(expanded(path))).name.removesuffix(".safetensors")


def locate(path: str) -> Path:
    """The local folder or file of a path, or of a name of the hub, which is downloaded.

    A local path wins over a name of the hub.

    Raises:
        CheckpointError: If it is neither.
    """
    local = expanded(path)
    if exists(local):
        return local
    if is_hub_name(path):
        return _download(path)
    raise CheckpointError(
        f"{path_shown(path)}: expected a folder, a .safetensors file or org/name@revision, "
        "received a missing path"
    )


def _download(path: str) -> Path:
    # HF_HUB_OFFLINE is the hub client's own switch: with it, only its local cache is looked at.
    from huggingface_hub import snapshot_download

    repo, _, revision = path.partition("@")
    try:
        folder = snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=list(_HUB_FILES),
            ignore_patterns=list(_HUB_SKIPPED),
        )
    except (OSError, ValueError) as error:  # every hub error is one of the two
        reason = name_shown(str(error).strip().split("\n")[0], 120)
        raise CheckpointError(
            f"{path_shown(path)}: expected a local path or a model of the hub, received "
            f"neither ({type(error).__name__}: {reason}); check the path, the revision and "
            "HF_HUB_OFFLINE"
        ) from error
    return Path(folder)
