"""What lies in a model folder beside its weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from mergesearch.merging.checkpoints.safetensors_files import COMPANIONS


def copy_companions(
    folder: Path, into: Path, leave: Callable[[Path], bool] = lambda file: False
) -> None:
    """Copy what a model folder holds beside its weights, but for the files that ``leave`` names."""
    for pattern in COMPANIONS:
        for file in folder.glob(pattern):
            if not leave(file):
                copy = into / file.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
