"""Paths that we did not write: asked about without surprise."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with its ``~`` replaced; as it is where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolved(path: str | Path) -> Path:
    """The whole path without links; as it is where links lead in a circle, or nothing can be."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a NUL
        return Path(path)


def exists(path: Path) -> bool:
    """Whether there is something at a path, which may be one that nothing can have."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name of 300 characters, a folder that may not be searched
        return False


def is_file(path: Path) -> bool:
    """Whether there is a file at a path, which may be one that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder at a path, which may be one that no folder can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
