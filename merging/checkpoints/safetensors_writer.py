"""Safetensors files written in place, tensor by tensor, in any order.

Names, shapes and dtypes of a merged model are known before its weights, so the header goes first
and each tensor to its own bytes. No shard is ever held in memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.checkpoints.safetensors_files import (
    CODES,
    ITEMSIZE,
    TensorInfo,
)

if TYPE_CHECKING:
    import torch


def lay_out_files(
    folder: Path, tensors: Mapping[str, TensorInfo], shard_bytes: int, stem: str = "model"
) -> dict[str, TensorInfo]:
    """Create the weight files of ``tensors`` in ``folder``, headers written and data still zero.

    One ``STEM.safetensors`` if they fit in ``shard_bytes``, else shards of at most that (a larger
    tensor gets a shard of its own) and an index.

    Returns:
        Where each tensor lies, to be filled by :func:`write_tensor`.
    """
    shards = _split(tensors, shard_bytes)
    count = len(shards)
    files = [f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
    files = [f"{stem}.safetensors"] if count == 1 else files
    infos: dict[str, TensorInfo] = {}
    for file, names in zip(files, shards, strict=True):
        infos |= _create(folder / file, {name: tensors[name] for name in names})
    if len(shards) > 1:
        _write_index(folder / f"{stem}.safetensors.index.json", infos)
    return infos


def write_tensor(info: TensorInfo, tensor: torch.Tensor) -> None:
    """Write ``tensor`` to the bytes that were laid out for it.

    Raises:
        ValueError: If its dtype or shape is not the one laid out.
    """
    import torch

    if tuple(tensor.shape) != info.shape or str(tensor.dtype) != f"torch.{info.dtype}":
        raise ValueError(
            f"expected {info.dtype} {info.shape}, received {tensor.dtype} {tuple(tensor.shape)}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    handle = os.open(info.file, os.O_WRONLY)
    try:
        write_at(handle, info.start, flat.numpy().data)
    finally:
        os.close(handle)


def write_patches(
    info: TensorInfo, positions: npt.NDArray[np.int64] | None, numbers: npt.NDArray[Any]
) -> None:
    """Write some numbers of a tensor over what :func:`write_tensor` wrote.

    Args:
        info: Where the tensor lies.
        positions: In the flat tensor, ascending; None for all.
        numbers: One for each, as they are stored.
    """
    if numbers.size == 0:
        return
    stored = np.memmap(
        info.file, numbers.dtype, "r+", offset=info.start, shape=(math.prod(info.shape),)
    )
    if positions is None:
        stored[:] = numbers
    else:
        stored[positions] = numbers


def write_at(handle: int, start: int, data: memoryview) -> None:
    """Write all of ``data`` at byte ``start``; threads may write to one file at once."""
    view = data.cast("B")
    while view:
        done = os.pwrite(handle, view, start)
        view = view[done:]
        start = start + done


def _split(tensors: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in tensors.items():
        size = info.stop - info.start
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _create(file: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    # Wide dtypes first, so that every tensor is aligned without gaps, as the safetensors library
    # writes them.
    names = sorted(tensors, key=lambda name: -ITEMSIZE[tensors[name].dtype])
    spans = {}
    end = 0
    for name in names:
        start = end
        end = end + tensors[name].stop - tensors[name].start
        spans[name] = (start, end)
    header = _header(tensors, spans)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        data = stream.tell()
        stream.truncate(data + end)
    return {
        name: TensorInfo(tensors[name].shape, tensors[name].dtype, file, data + start, data + stop)
        for name, (start, stop) in spans.items()
    }


def _header(tensors: Mapping[str, TensorInfo], spans: Mapping[str, Sequence[int]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, span in spans.items():
        info = tensors[name]
        entries[name] = {
            "dtype": CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": list(span),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write_index(file: Path, infos: Mapping[str, TensorInfo]) -> None:
    total = sum(info.stop - info.start for info in infos.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {n: i.file.name for n, i in sorted(infos.items())},
    }
    file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
