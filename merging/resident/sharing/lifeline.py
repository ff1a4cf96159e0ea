"""A file that is locked as long as a process lives, so that others see its end at once.

The system frees the lock of whoever dies, however it dies; no message has to arrive and no process
number can be mistaken for that of another.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from filelock import lock_descriptor

_SUFFIX = ".alive"
#: Suffix until the lock is held: what is swept has never been unlocked.
_PART = ".part"


class Lifeline:
    """Held by this process until it ends or lets go.

    Args:
        folder: On this node; created if missing.
        name: Unique; files of the folder whose names begin with it belong to its holder.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        self.path = folder / f"{name}{_SUFFIX}"
        part = folder / f"{name}{_PART}"
        self._file = part.open("w")
        lock_descriptor(self._file.fileno())
        part.rename(self.path)

    def close(self) -> None:
        """Let go."""
        self.path.unlink(missing_ok=True)
        self._file.close()


def is_alive(path: Path) -> bool:
    """Whether the process that made a lifeline still holds it."""
    try:
        with path.open() as file:
            return not lock_descriptor(file.fileno(), blocking=False)
    except FileNotFoundError:
        return False


def sweep(folder: Path) -> None:
    """Remove what processes that have died left in a folder."""
    for path in folder.glob(f"*{_SUFFIX}"):
        if not is_alive(path):
            for left in folder.glob(f"{path.stem}.*"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(left)
