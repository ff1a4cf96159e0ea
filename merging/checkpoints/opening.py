"""opening."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint, _Homes
from mergesearch.merging.checkpoints.adapter_files import AdapterFiles, read_adapter
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.locations import locate, short_name, split_path
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.tensors.memo import Memo

if TYPE_CHECKING:
    pass


from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.adapter_files import is_adapter
from mergesearch.merging.checkpoints.safetensors_files import (
    folder_tensors,
    read_header,
    read_json,
    refuse_other_files,
)
from mergesearch.merging.tensors.layout import natural_key

if TYPE_CHECKING:
    pass


def open_adapted(path: str, folder: Path | None, name: str, memo: Memo | None) -> AdaptedCheckpoint:
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
    model = open_checkpoint(model_path)
    if isinstance(model, AdaptedCheckpoint):
        raise CheckpointError(
            f"{path}: expected MODEL+ADAPTER, received two adapters; merge the first with peft"
        )
    changes, whole = _Homes(model, adapter).find()
    tensors = {stored: whole.get(stored, info) for stored, info in model.tensors.items()}
    full = f"{model_path}+{adapter_path}"
    return AdaptedCheckpoint(
        name,
        full,
        model.folder,
        tensors,
        model.config,
        memo,
        model=model,
        adapter=adapter,
        changes=changes,
    )


def _own_model(path: str, adapter: AdapterFiles) -> str:
    """The local model that an adapter's settings name."""
    place = Path(adapter.base).expanduser()
    if not adapter.base or not place.exists():
        raise CheckpointError(
            f"{path}: expected an adapter of a local model, received one of "
            f"{adapter.base or 'an unnamed model'!r}; "
            f"write BASE+ADAPTER, for example {adapter.base or 'org/model'}+{path}"
        )
    return str(place.resolve())


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def open_checkpoint(path: str, name: str = "", memo: Memo | None = None) -> Checkpoint:
    """Open a Hugging Face folder, a single ``.safetensors`` file, or ``org/name@revision`` of the
    model hub.

    ``MODEL+ADAPTER`` is a model with a LoRA adapter, as is the folder of an adapter that names a
    local model. A local path wins over a hub name. Only headers and configurations are read.

    Raises:
        CheckpointError: If nothing is there, or it is damaged, or it would need pickle.
    """
    place = locate(path) if split_path(path) is None else None
    if place is None or is_adapter(place):
        return open_adapted(path, place, name or short_name(path), memo)
    if place.is_dir():
        folder = place
        tensors = folder_tensors(place)
        config = _read_config(place)
    else:
        refuse_other_files(place)
        folder = None
        tensors = read_header(place)
        config = {}
    ordered = {key: tensors[key] for key in sorted(tensors, key=natural_key)}
    return Checkpoint(name or short_name(path), path, folder, ordered, config, memo)
