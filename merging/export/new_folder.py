"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mergesearch.merging.checkpoints.atomic import sync
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.paths import resolved


def check_target(target: Path, sources: Iterable[Checkpoint], overwrite: bool) -> None:
    """Refuse a folder that is in use, or that holds a source.

    Raises:
        InputError: In one line.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(
            f"{target}: expected a folder to create, received a file; choose another place"
        )
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"{target}: expected no folder or an empty one, received files; choose another or "
            "overwrite"
        )
    for source in sources:
        if any(resolved(file).is_relative_to(target) for file in source.files):
            raise InputError(
                f"{target}: expected a folder without sources, received the one of {source.name!r}"
            )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write in, which appears as ``target`` at the end; nothing is left if that fails.

    What was at ``target`` is removed only when everything else is on disk.

    Raises:
        OSError: If it cannot be written.
    """
    part = target.with_name(f".{target.name}.part-{os.getpid()}-{os.urandom(3).hex()}")
    try:
        part.mkdir(parents=True)
        yield part
        _put(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # gone already when all went well


def _put(part: Path, target: Path) -> None:
    for path in (*part.rglob("*"), part):
        sync(path)
    old = part.with_name(f"{part.name}-old")
    if target.exists():
        target.rename(old)
    try:
        part.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
