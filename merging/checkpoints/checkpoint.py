"""Checkpoints: safetensors files seen through their headers, read tensor by tensor when asked.

Opening a checkpoint parses headers and ``config.json`` only, so everything that can be refused
early is refused before a weight is read. No pickle is ever opened. Stored names are kept as they
are on disk.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.digests import tensor_digests
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE, TensorInfo
from mergesearch.merging.checkpoints.tied import find_aliases, is_carried, ties_embeddings
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.shown import name_shown, path_shown, shown
from mergesearch.merging.tensors.memo import Memo

if TYPE_CHECKING:
    import torch


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
        denoiser: Name of ``folder`` where it is the part of a diffusers pipeline that is merged.
    """

    name: str
    path: str
    folder: Path | None
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    memo: Memo | None = None
    denoiser: str = ""

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
        return tuple(
            name
            for name, info in self.tensors.items()
            if name not in self.aliases and is_carried(name, info)
        )

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
        """The same as :meth:`fingerprint`."""
        return self._fingerprint

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor ``name``, from the header."""
        return self._info(name).shape

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name`` in its stored dtype, memory-mapped.

        The mapping is copy-on-write: the file never changes.

        Raises:
            CheckpointError: If there is no such tensor.
        """
        return read_tensor(self._info(name))

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all tensors, however they are sharded.

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
                    f"{path_shown(self.path)}: expected tied tensors {shown(alias)} and "
                    f"{shown(kept)} to be equal, "
                    'received others; set "tie_word_embeddings": false in config.json to merge '
                    "them apart"
                )
        text = json.dumps(
            [[n, i.dtype, list(i.shape), digests[n]] for n, i in sorted(self.tensors.items())]
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            some = ", ".join(name_shown(name, 40) for name in list(self.tensors)[:3])
            raise CheckpointError(
                f"{path_shown(self.path)}: expected a stored tensor, received {shown(name)}; there "
                f"are {some}, ..."
            )
        return self.tensors[name]


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """A stored tensor in its stored dtype, memory-mapped.

    The mapping is copy-on-write: the file never changes.

    Raises:
        CheckpointError: If the file is gone or shorter than when its header was read.
    """
    import torch

    dtype = getattr(torch, info.dtype)
    if info.start == info.stop:
        return torch.empty(info.shape, dtype=dtype)
    # A mapping of its own for each tensor: it goes with the tensor, so streaming stays within
    # bounds.
    first = info.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        with info.file.open("rb") as file:
            length = info.stop - first
            pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=first)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path_shown(info.file)}: expected bytes {info.start} to {info.stop}, received: "
            f"{getattr(error, 'strerror', None) or error}; it changed since it was opened"
        ) from error
    flat = torch.frombuffer(pages, dtype=torch.uint8, offset=info.start - first)
    if info.start % ITEMSIZE[info.dtype]:
        flat = flat.clone()  # odd header length: a typed view would be misaligned
    return flat.view(dtype).reshape(info.shape)
