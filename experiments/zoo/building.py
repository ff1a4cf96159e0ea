"""Builds zoos: whole or not at all, on one thread, reused where the settings are the same."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mergesearch.merging import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def build_beside(
    out: Path, kind: str, complete: Callable[[], bool], write: Callable[[Path], None]
) -> None:
    """Make a zoo in ``out`` unless it is complete there.

    It is written beside ``out`` and renamed when complete, so a killed build leaves nothing
    half-made there.

    Args:
        out: Folder to make.
        kind: What the zoo is called, for messages.
        complete: Whether ``out`` holds the zoo that is wanted.
        write: Writes it into a folder, the manifest last.

    Raises:
        InputError: If ``out`` is something else than a zoo.
    """
    if complete():
        return
    if out.exists() and not (out / "manifest.json").is_file():
        raise InputError(
            f"--out: expected a new folder or a {kind} zoo, received {out}; choose another"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        fresh = Path(scratch) / "zoo"
        with one_thread():
            write(fresh)
        if not complete():  # another process may have been faster
            if out.exists():
                out.rename(Path(scratch) / "old")
            fresh.rename(out)


def holds(out: Path, number: int, settings: DataclassInstance) -> bool:
    """Whether the manifest in ``out`` is that of a format's number and settings."""
    path = out / "manifest.json"
    if not path.is_file():
        return False
    manifest = json.loads(path.read_text())
    return bool(manifest.get("format") == number and manifest.get("settings") == asdict(settings))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread, so that weights do not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
