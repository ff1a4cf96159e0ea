"""The heads of an exported merge whose experts keep their own: one folder for each.

``heads/NAME`` holds the head's tensors as their source stores them, the configuration of the whole
model, and, where its names of the shared tensors are others than the base's, a list of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo, read_json
from mergesearch.merging.checkpoints.safetensors_writer import lay_out_files, write_tensor
from mergesearch.merging.errors import InputError
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.family.headed_base import extended_base, headed_base, headed_config
from mergesearch.merging.family.heads import Head, Heads
from mergesearch.merging.family.preflight import layout_of

#: Folder of the heads in that of the exported model.
HEADS = "heads"
#: Name of a shared tensor -> its name in the whole model.
NAMES = "names.json"


def family_to_write(family: ModelFamily, head: str | None) -> ModelFamily:
    """The family with the base that is written: with another head, or tensors of single experts.

    Args:
        family: Base and experts.
        head: Of the model; None for the shared part, beside which heads are written.

    Raises:
        InputError: If there is no such head.
    """
    heads = family.heads
    if heads is None:
        if head is not None:
            raise InputError(
                f"head: expected a merge whose experts keep heads of their own (special: {{heads: "
                f"own}}), received {head!r} for one that shares all tensors"
            )
        return family
    if head is None:
        base = extended_base(family.base, heads)
        return replace(family, base=base, rebuilt=family.rebuilt or base is not family.base)
    base = headed_base(family.base, heads, head)
    if family.alignment is not None:
        base = replace(base, folder=family.base.folder)  # whose tokenizer has the merged rows
    own = heads.head(head).renamed
    chosen = replace(heads, chosen=head)
    return replace(family, base=base, rebuilt=True, heads=chosen, stored_as=own)


def names_written(stored: Mapping[str, TensorInfo], family: ModelFamily) -> dict[str, TensorInfo]:
    """Tensors under the names with which a family is written."""
    return {family.stored_as.get(name, name): info for name, info in stored.items()}


def write_heads(base: Checkpoint, heads: Heads, folder: Path) -> None:
    """Write the heads of all experts that have one; none beside a model that has its head.

    Args:
        base: The base, as policies make it.
        heads: What the sources have of their own.
        folder: Of the exported model.
    """
    if heads.chosen is not None:
        return
    for name, head in heads.apart.items():
        place = folder / HEADS / name
        place.mkdir(parents=True)
        infos = {one: head.source.tensors[one] for one in sorted(head.names)}
        for one, info in lay_out_files(place, infos, shard_bytes=5_000_000_000).items():
            write_tensor(info, head.source.read(one))
        config = json.dumps(headed_config(base, heads, name), indent=2)
        (place / "config.json").write_text(f"{config}\n", encoding="utf-8")
        if head.renamed:
            names = json.dumps(dict(head.renamed), indent=1)
            (place / NAMES).write_text(f"{names}\n", encoding="utf-8")


def written_family(folder: Path, name: str) -> ModelFamily:
    """The base of an exported merge with one of the heads that are written beside it.

    Raises:
        InputError: If the folder has no such head.
    """
    places = {place.name: place for place in sorted((folder / HEADS).glob("*")) if place.is_dir()}
    if name not in places:
        raise InputError(
            f"{folder}: expected one of the heads {', '.join(places) or 'none'}, received {name!r}"
        )
    backbone = open_checkpoint(str(folder))
    of = {one: _stored_head(place, one) for one, place in places.items()}
    names = frozenset[str]().union(*(head.names for head in of.values()))
    base = headed_base(backbone, Heads(backbone, names, of), name)
    return ModelFamily(base, (), layout_of(base), rebuilt=True, stored_as=of[name].renamed)


def head_names(folder: Path, name: str) -> frozenset[str]:
    """Tensors of a head of an exported merge; for the base's, those that may be its own."""
    places = [place for place in sorted((folder / HEADS).glob("*")) if place.is_dir()]
    own = [place for place in places if place.name == name] or places
    return frozenset().union(*(open_checkpoint(str(place)).tensors for place in own))


def _stored_head(place: Path, name: str) -> Head:
    source = open_checkpoint(str(place), name)
    names = read_json(place / NAMES) if (place / NAMES).is_file() else {}
    return Head(source, frozenset(source.tensors), names)
