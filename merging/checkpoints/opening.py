"""Opening a checkpoint: a folder, a file, a model of the hub, or a model with an adapter."""

from __future__ import annotations

from pathlib import Path

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint, adapted_tensors
from mergesearch.merging.checkpoints.adapter_files import AdapterFiles, is_adapter, read_adapter
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.locations import locate, short_name, split_path
from mergesearch.merging.checkpoints.model_config import read_config
from mergesearch.merging.checkpoints.pack_files import (
    MANIFEST,
    Pack,
    is_pack,
    pack_around,
    read_pack,
)
from mergesearch.merging.checkpoints.packed import PackedCheckpoint, packed_expert
from mergesearch.merging.checkpoints.pipelines import denoiser_of
from mergesearch.merging.checkpoints.safetensors_files import (
    folder_tensors,
    read_header,
    refuse_other_files,
)
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.paths import exists, expanded, resolved
from mergesearch.merging.foreign.shown import name_shown, path_shown, shown, shown_names
from mergesearch.merging.tensors.layout import natural_key
from mergesearch.merging.tensors.memo import Memo


def open_checkpoint(path: str, name: str = "", memo: Memo | None = None) -> Checkpoint:
    """Open a checkpoint: a folder, a file, a model of the hub, or a model with an adapter.

    Given as the path of a Hugging Face folder or of a ``.safetensors`` file, or as
    ``org/name@revision`` of the hub. Of the folder of a diffusers pipeline the denoiser is opened.

    ``MODEL+ADAPTER`` is a model with a LoRA adapter, as is the folder of an adapter that names a
    local model. A local path wins over a hub name. Only headers and configurations are read.

    Raises:
        CheckpointError: If nothing is there, or it is damaged, or it would need pickle.
    """
    local = locate(path) if split_path(path) is None else None
    if local is None or is_adapter(local):
        return _open_adapted(path, local, name or short_name(path), memo)
    pack = pack_around(local)
    if pack is not None:
        return _open_packed(read_pack(pack), local, path, name or short_name(path), memo)
    denoiser = ""
    folder: Path | None = None
    if local.is_dir():
        _refuse_whole_pack(local)
        denoiser = denoiser_of(local)
        folder = local / denoiser
        tensors = folder_tensors(folder)
        config = read_config(folder)
    else:
        refuse_other_files(local)
        tensors = read_header(local)
        config = {}
    ordered = {key: tensors[key] for key in sorted(tensors, key=natural_key)}
    return Checkpoint(name or short_name(path), path, folder, ordered, config, memo, denoiser)


def _open_packed(
    pack: Pack, folder: Path, path: str, name: str, memo: Memo | None
) -> PackedCheckpoint:
    """The expert of a pack in ``folder``.

    Raises:
        CheckpointError: If the base is gone, or does not fit the pack.
    """
    if not exists(expanded(pack.base)):
        raise CheckpointError(
            f"{path_shown(pack.folder)}: expected its base at {path_shown(pack.base)}, received a "
            f"missing path; put it there, or write its place to base.path in {MANIFEST}"
        )
    return packed_expert(pack, folder.name, open_checkpoint(pack.base), path, name, memo)


def _refuse_whole_pack(folder: Path) -> None:
    if is_pack(folder):
        names = read_pack(folder).names
        raise CheckpointError(
            f"{path_shown(folder)}: expected a model, received a pack of {shown_names(names)}; "
            f"give one of them, such as {path_shown(folder / names[0])}"
        )


def _open_adapted(
    path: str, folder: Path | None, name: str, memo: Memo | None
) -> AdaptedCheckpoint:
    """The checkpoint of an adapter in ``folder``, or of ``MODEL+ADAPTER`` if that is None.

    Raises:
        CheckpointError: If the adapter cannot be merged, does not fit the model, or does not say
            what its model is.
    """
    parts = split_path(path)
    adapter = read_adapter(
        locate(parts[1]) if folder is None and parts is not None else Path(folder or path)
    )
    model_path, adapter_path = parts or (_own_model(path, adapter), path)
    below = locate(model_path) if split_path(model_path) is None else None
    if below is None or is_adapter(below):  # before it is opened: an adapter may name itself
        raise CheckpointError(
            f"{path_shown(path)}: expected MODEL+ADAPTER, received two adapters; merge the "
            "first with peft"
        )
    model = open_checkpoint(model_path)
    adapted = adapted_tensors(model, adapter)
    tensors = {key: adapted.tensors[key] for key in sorted(adapted.tensors, key=natural_key)}
    full = f"{model_path}+{adapter_path}"
    return AdaptedCheckpoint(
        name,
        full,
        model.folder,
        tensors,
        adapted.config,
        memo,
        model=model,
        adapter=adapter,
        changes=adapted.changes,
        stored_as=adapted.stored_as,
    )


def _own_model(path: str, adapter: AdapterFiles) -> str:
    """The local model that an adapter's settings name."""
    local = expanded(adapter.base)
    if not adapter.base or not exists(local):
        named = name_shown(adapter.base or "org/model")
        raise CheckpointError(
            f"{path_shown(path)}: expected an adapter of a local model, received one of "
            f"{shown(adapter.base or 'an unnamed model')}; write BASE+ADAPTER, for example "
            f"{named}+{name_shown(path, 100)}"
        )
    return str(resolved(local))
