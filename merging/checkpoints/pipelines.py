"""Folders of diffusers: a model whose weights have a name of their own, and pipelines around it.

A pipeline is a folder with ``model_index.json`` and a folder for each of its models. The one that
is merged is the denoiser, in ``unet`` or ``transformer``; the others stay those of the base.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

#: Folders of a pipeline that may hold its denoiser, the preferred one first.
DENOISERS = ("unet", "transformer")
INDEX_OF_PIPELINE = "model_index.json"
#: Beginning of the names of weight files, as transformers and as diffusers write them.
STEMS = ("model", "diffusion_pytorch_model")

#: What the other folders of a pipeline hold that is copied: never code or pickle.
_DATA = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


def stem_in(folder: Path) -> str | None:
    """Beginning of the names of a folder's weight files, None where there are none."""
    for stem in STEMS:
        names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
        if any((folder / name).is_file() for name in names):
            return stem
    return None


def denoiser_of(folder: Path) -> str:
    """Name of the folder of a pipeline that is merged; empty for any other folder."""
    if not (folder / INDEX_OF_PIPELINE).is_file() or stem_in(folder) is not None:
        return ""
    return next((name for name in DENOISERS if stem_in(folder / name) is not None), "")


def add_other_models(pipeline: Path, denoiser: str, target: Path) -> None:
    """Put everything of a pipeline but its denoiser into ``target``.

    Files are hard links where source and target are on one disk, else copies.
    """
    for file in _other_files(pipeline, denoiser):
        copy = target / file.relative_to(pipeline)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), copy)
        except OSError:
            shutil.copyfile(file, copy)


def _other_files(pipeline: Path, denoiser: str) -> Iterator[Path]:
    for pattern in (INDEX_OF_PIPELINE, "LICENSE*", "NOTICE*"):
        yield from pipeline.glob(pattern)
    for folder in sorted(path for path in pipeline.iterdir() if path.is_dir()):
        if folder.name != denoiser and not folder.name.startswith("."):
            for pattern in _DATA:
                yield from folder.glob(pattern)
