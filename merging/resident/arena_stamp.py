"""Stamps of arena files: a file whose content was compared once is trusted while it stays the same.

Comparing the content of an arena with its hash reads all of it. One process of a host does so and
leaves a stamp beside the file; the others wait for it and trust the stamp as long as the file has
the same size, time of change and inode. A stamp holds for one host until it boots again, because
what it trusts is that host's view of the disk.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.json_text import parse_json
from mergesearch.merging.resident.arena_files import hash_file

#: Changes with every start of the machine; Linux alone has it.
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def stamp_file(file: Path) -> Path:
    """This host's stamp of an arena file."""
    return file.with_name(f"{file.name}.{socket.gethostname()}.stamp")


def is_whole(file: Path, content: str) -> bool:
    """Whether an arena file has the content that its name promises.

    It is read at most once for each start of this host, whatever number of processes ask.

    Args:
        file: The arena file.
        content: Its hash, as :func:`mergesearch.merging.resident.arena_files.hash_file` gives it.

    Raises:
        OSError: If the file cannot be read.
    """
    with _held(stamp_file(file)) as stamp:
        if stamp is not None and _read(stamp) == _expected(file, content):
            return True
        expected = _expected(file, content)  # as it was before it was read
        whole = hash_file(file) == content
        if whole and stamp is not None:
            _write(stamp, expected)
        return whole


def remember(file: Path, content: str) -> None:
    """Leave a stamp for a file that this process has just written and hashed."""
    with _held(stamp_file(file)) as stamp:
        if stamp is not None:
            _write(stamp, _expected(file, content))


def remove_stamps(file: Path) -> None:
    """Remove the stamps of an arena file that is no more, of all hosts."""
    for stamp in file.parent.glob(f"{file.name}.*.stamp"):
        with suppress(OSError):
            stamp.unlink()


def _expected(file: Path, content: str) -> dict[str, Any]:
    """What a valid stamp says of the file as it is now."""
    status = file.stat()
    boot = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""
    return {
        "content": content,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
        "boot": boot,
    }


@contextmanager
def _held(path: Path) -> Iterator[IO[str] | None]:
    """Open a stamp that no other process reads or writes meanwhile; None where it cannot be."""
    try:
        stamp = path.open("a+", encoding="utf-8")
    except OSError:  # a folder that may only be read
        yield None
        return
    with stamp:
        lock_descriptor(stamp.fileno())
        yield stamp


def _read(stamp: IO[str]) -> Any:
    stamp.seek(0)
    with suppress(InputError, ValueError):
        return parse_json(stamp.read(1 << 16), "stamp")
    return None


def _write(stamp: IO[str], content: dict[str, Any]) -> None:
    # A stamp is worth nothing on a full disk, and nothing is lost without it.
    with suppress(OSError):
        stamp.seek(0)
        stamp.truncate()
        stamp.write(json.dumps(content))
        stamp.flush()
        os.fsync(stamp.fileno())
