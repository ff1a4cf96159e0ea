"""Models of single heads: around the base in a search, and around an exported merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.safetensors_files import read_json
from mergesearch.merging.errors import InputError
from mergesearch.merging.export.folder import folder_of_base
from mergesearch.merging.export.head_folders import HEADS, NAMES
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.family.heads import BASE, Head, Heads, headed_base, model_dtype
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.models.parameter_views import StoredTensors


def head_model(family: ModelFamily, name: str, model_class: str, beside: Path) -> nn.Module:
    """The model of one head, whose shared weights wait for a merge to take their place.

    Its configuration, its head and its class are those of the source; everything that is not
    merged and no head is the base's. No parameter asks for a gradient.

    Args:
        family: Base and experts, which keep heads of their own.
        name: Of an expert, or ``base``.
        model_class: A ``transformers`` auto class.
        beside: Folder for what must be written to be loaded.

    Raises:
        CheckpointError: If the source cannot be loaded by that class.
    """
    heads = family.heads
    assert heads is not None
    head = heads.head(name)
    if family.rebuilt:
        base = headed_base(family.base, heads, name)
        with folder_of_base(replace(family, base=base, stored_as=head.renamed), beside) as folder:
            model = load_model(folder, model_class)
    else:
        model = load_model(head.source.path, model_class, model_dtype(family.base))
        _take_carried(model, family.base, heads, head.renamed)
    return model.requires_grad_(False)


def load_with_head(folder: Path, name: str, model_class: str) -> nn.Module:
    """An exported merge with one of its heads.

    Args:
        folder: As :func:`mergesearch.merging.export.folder.export_model` writes it.
        name: Of the head, or ``base`` for that of the folder itself.
        model_class: A ``transformers`` auto class.

    Raises:
        InputError: If the folder has no such head.
    """
    places = {place.name: place for place in sorted((folder / HEADS).glob("*")) if place.is_dir()}
    if name == BASE and name not in places:
        return load_model(str(folder), model_class)
    if name not in places:
        raise InputError(
            f"{folder}: expected one of the heads {', '.join(places) or 'none'}, received {name!r}"
        )
    backbone = open_checkpoint(str(folder))
    of = {one: _stored_head(place, one) for one, place in places.items()}
    names = frozenset[str]().union(*(head.names for head in of.values()))
    base = headed_base(backbone, Heads(backbone, names, of), name)
    family = ModelFamily(base, (), layout_of(base), rebuilt=True, stored_as=of[name].renamed)
    with (
        TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside,
        folder_of_base(family, Path(beside)) as whole,
    ):
        return load_model(whole, model_class)


def _stored_head(place: Path, name: str) -> Head:
    source = open_checkpoint(str(place), name)
    names = read_json(place / NAMES) if (place / NAMES).is_file() else {}
    return Head(source, frozenset(source.tensors), names)


def _take_carried(
    model: nn.Module, base: Checkpoint, heads: Heads, renamed: Mapping[str, str]
) -> None:
    """Copy what a merge takes from the base into a model that was loaded from an expert."""
    stored = StoredTensors.of(model).by_name
    with torch.no_grad():
        for name in base.carried:
            target = None if name in heads.names else stored.get(renamed.get(name, name))
            if target is not None and tuple(target.shape) == base.shape(name):
                target.copy_(base.read(name))
