"""Checkpoints: safetensors files seen through their headers, read tensor by tensor when asked.

Opening a checkpoint parses headers and ``config.json`` only, so everything that can be refused early is refused
before a weight is read. No pickle is ever opened. Stored names are kept as they are on disk.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.digests import tensor_digests
from merging.errors import CheckpointError
from merging.layout import natural_key
from merging.lora_files import is_adapter
from merging.memo import Memo
from merging.tied import find_aliases, is_carried, ties_embeddings
from merging.weight_files import (
    COMPANIONS,
    INDEX,
    ITEMSIZE,
    TensorInfo,
    folder_tensors,
    read_header,
    read_json,
    refuse_other_files,
)

if TYPE_CHECKING:
    import torch

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_HUB_FILES = ("*.safetensors", INDEX, *COMPANIONS, "README.md", "adapter_config.json")
_HUB_SKIPPED = ("*/*.safetensors", "consolidated*.safetensors")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A stored model, seen through its headers.

    Attributes:
        name: Short name used in tables and messages.
        path: Where it was asked for: folder, ``.safetensors`` file, or ``org/name@revision``.
        folder: Folder with ``config.json`` and tokenizer files; None for a single file.
        tensors: Every stored tensor by name, in natural order.
        config: Content of ``config.json``, ``{}`` when there is none.
        memo: Where results that several hyperparameters share are kept, or None.
    """

    name: str
    path: str
    folder: Path | None
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    memo: Memo | None = None

    @classmethod
    def open(cls, path: str, name: str = "", memo: Memo | None = None) -> Checkpoint:
        """Open a Hugging Face folder, a single ``.safetensors`` file, or ``org/name@revision`` of the model hub.

        ``MODEL+ADAPTER`` is a model with a LoRA adapter, as is the folder of an adapter that names a local model. A
        local path wins over a hub name. Only headers and configurations are read.

        Raises:
            CheckpointError: If nothing is there, or it is damaged, or it would need pickle.
        """
        place = locate(path) if split_path(path) is None else None
        if place is None or is_adapter(place):
            from merging.adapter import open_adapted

            return open_adapted(path, place, name or short_name(path), memo)
        if place.is_dir():
            folder, tensors, config = place, folder_tensors(place), _read_config(place)
        else:
            refuse_other_files(place)
            folder, tensors, config = None, read_header(place), {}
        ordered = {key: tensors[key] for key in sorted(tensors, key=natural_key)}
        return cls(name or short_name(path), path, folder, ordered, config, memo)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Tied tensors that are stored twice: alias -> the name that is kept and merged."""
        return dict(find_aliases(self.tensors, ties_embeddings(self.config)))

    @cached_property
    def merged(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Floating tensors that take part in a merge, tied ones once: name -> (shape, dtype)."""
        return {
            name: (info.shape, info.dtype)
            for name, info in self.tensors.items()
            if name not in self.aliases and not is_carried(name, info)
        }

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """Tensors that a merge copies from the base: integers, booleans, computed constants."""
        return tuple(name for name, info in self.tensors.items() if name not in self.aliases and is_carried(name, info))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the merged tensors, in the order of the layout."""
        return tuple(self.merged)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the weights lie in, sorted."""
        return tuple(sorted({info.file.resolve() for info in self.tensors.values()}))

    @property
    def identity(self) -> str:
        """The :meth:`fingerprint`."""
        return self._fingerprint

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor ``name``, from the header."""
        return self._info(name).shape

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name`` in its stored dtype, memory-mapped and copy-on-write: the file never changes.

        Raises:
            CheckpointError: If there is no such tensor.
        """
        return read_tensor(self._info(name))

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all tensors; the same however they are sharded.

        Reads all weights once, in blocks.

        Raises:
            CheckpointError: If two tensors that the configuration ties hold different values.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digests = tensor_digests(self.tensors)
        for alias, kept in self.aliases.items():
            if digests[alias] != digests[kept]:
                raise CheckpointError(
                    f"{self.path}: expected tied tensors {alias!r} and {kept!r} to be equal, received others; "
                    'set "tie_word_embeddings": false in config.json to merge them apart'
                )
        text = json.dumps([[n, i.dtype, list(i.shape), digests[n]] for n, i in sorted(self.tensors.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            some = ", ".join(list(self.tensors)[:3])
            raise CheckpointError(f"{self.path}: expected a stored tensor, received {name!r}; there are {some}, ...")
        return self.tensors[name]


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """A stored tensor in its stored dtype, memory-mapped and copy-on-write: the file never changes."""
    import torch

    dtype = getattr(torch, info.dtype)
    if info.start == info.stop:
        return torch.empty(info.shape, dtype=dtype)
    # A mapping of its own for each tensor: it goes with the tensor, so streaming stays within bounds.
    first = info.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with info.file.open("rb") as file:
        pages = mmap.mmap(file.fileno(), info.stop - first, access=mmap.ACCESS_COPY, offset=first)
    flat = torch.frombuffer(pages, dtype=torch.uint8, offset=info.start - first)
    if info.start % ITEMSIZE[info.dtype]:
        flat = flat.clone()  # odd header length: a typed view would be misaligned
    return flat.view(dtype).reshape(info.shape)


def split_path(path: str, folder: Path | None = None) -> tuple[str, str] | None:
    """Model and adapter of ``MODEL+ADAPTER``; None for any other path, also one that exists with a + in its name.

    Args:
        path: As given to :meth:`Checkpoint.open`.
        folder: Where relative paths start; the working directory if it is None.
    """
    if "+" not in path or _exists(path, folder):
        return None
    places = [place for place, letter in enumerate(path) if letter == "+"]
    pairs = [(path[:place], path[place + 1 :]) for place in reversed(places)]
    # Folders may have a + in their names: the last split of which both parts are something, else the last.
    return next((p for p in pairs if all(_exists(part, folder) or is_hub_name(part) for part in p)), pairs[0])


def absolute_path(path: str, folder: Path) -> str:
    """The path with its local parts, which start at ``folder``, in full; hub names and what is missing stay."""
    parts = split_path(path, folder)
    if parts is not None:
        return "+".join(absolute_path(part, folder) for part in parts)
    return os.path.abspath(folder / Path(path).expanduser()) if path and _exists(path, folder) else path


def _exists(path: str, folder: Path | None) -> bool:
    return ((folder or Path()) / Path(path).expanduser()).exists()


def is_hub_name(path: str) -> bool:
    """Whether ``path`` reads as ``org/name`` or ``org/name@revision``."""
    return _HUB_NAME.fullmatch(path) is not None


def short_name(path: str) -> str:
    """Name for tables: the folder or file name, or the hub name without organisation and revision.

    A model with an adapter goes by the adapter.
    """
    _, path = split_path(path) or ("", path)
    if is_hub_name(path) and not Path(path).exists():
        path = path.split("@")[0]
    return Path(os.path.abspath(Path(path).expanduser())).name.removesuffix(".safetensors")


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def locate(path: str) -> Path:
    """The local folder or file of a path or hub name; a local path wins, a hub name is downloaded.

    Raises:
        CheckpointError: If it is neither.
    """
    place = Path(path).expanduser()
    if place.exists():
        return place
    if is_hub_name(path):
        return _download(path)
    raise CheckpointError(
        f"{path}: expected a folder, a .safetensors file or org/name@revision, received a missing path"
    )


def _download(path: str) -> Path:
    # HF_HUB_OFFLINE is the hub client's own switch: with it, only its local cache is looked at.
    from huggingface_hub import snapshot_download

    repo, _, revision = path.partition("@")
    try:
        folder = snapshot_download(
            repo, revision=revision or None, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_SKIPPED)
        )
    except (OSError, ValueError) as error:  # every hub error is one of the two
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path}: expected a local path or a model of the hub, received neither "
            f"({type(error).__name__}: {reason}); check the path, the revision and HF_HUB_OFFLINE"
        ) from error
    return Path(folder)
