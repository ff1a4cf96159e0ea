"""Files of an arena folder: names, content hashes, sheets that appear whole, and the lock."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from mergesearch.merging.checkpoints.atomic import sync
from mergesearch.merging.foreign.own_json import with_checksum

#: Suffix of files that are being written.
PART = ".part"

_BLOCK = 1 << 22  # bytes read at a time when hashing


def arena_file(folder: Path, key: str, content: str) -> Path:
    """The file of the arena of this key and content hash."""
    return folder / f"{key}.{content[:16]}.arena"


def sheet_file(folder: Path, key: str) -> Path:
    """The JSON sheet of the arena of this key."""
    return folder / f"{key}.json"


def write_sheet(sheet: Mapping[str, Any], path: Path) -> None:
    """Write a sheet in one step; it and the files written before it are on disk afterwards."""
    part = path.with_name(f"{path.name}{PART}")
    with part.open("w", encoding="utf-8") as file:
        json.dump(with_checksum(sheet), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync(path.parent)  # the new names of arena and sheet


def hash_file(path: Path) -> str:
    """XXH3 of a file, at memory bandwidth: it detects damage, not forgery."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when its holder dies."""
    with (folder / "lock").open("a") as file:
        lock_descriptor(file.fileno())
        yield
