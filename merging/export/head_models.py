"""Models of single heads: around the base in a search, and around an exported merge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from mergesearch.merging.export.folder import folder_of_base
from mergesearch.merging.export.head_folders import HEADS, written_family
from mergesearch.merging.family.aligned import model_dtype
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.family.headed_base import headed_base
from mergesearch.merging.family.heads import BASE
from mergesearch.merging.models.loading import load_model, no_report
from mergesearch.merging.models.own_heads import take_carried
from mergesearch.merging.models.whole_model import WholeModel


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
        whole = WholeModel(head.source.path, heads.names, head.renamed)
        take_carried(model, family.base, family.base.carried, whole)
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
    if name == BASE and not (folder / HEADS / name).is_dir():
        return load_model(str(folder), model_class)
    family = written_family(folder, name)
    with (
        no_report(),  # the base may have a head that this class lacks
        TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside,
        folder_of_base(family, Path(beside)) as whole,
    ):
        return load_model(whole, model_class)
