"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from mergesearch.merging.foreign.paths import resolved


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk.

    Raises:
        OSError: If the disk fails.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write under a temporary name, fsync, rename: a crash leaves the old file or the new one.

    A link stays one: the file that it leads to is replaced.

    Raises:
        OSError: If the file cannot be written, or is no file, such as /dev/stdout; nothing is left
            behind.
    """
    path = resolved(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
