"""Rows of stored tensors, read by byte ranges within a budget.

A tensor is seen as a matrix whose rows are contiguous in its file: trailing dimensions form a row
as long as it stays short. Convolutions have a row for each output channel, stacks of expert
matrices one for each row of each matrix.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE, TensorInfo
from mergesearch.merging.family.aligned import Aligned

Rows = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

#: Elements of a row beyond which no further dimension is added to it.
LONGEST_ROW = 16384
#: Bytes that a storage reads at a time at least; shorter rows are sampled in runs of neighbours.
PAGE = 4096
#: Places that are sampled in a tensor at least.
PLACES = 4


def matrix_view(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns that a tensor is seen as; a vector is one row."""
    if len(shape) < 2:
        return 1, int(np.prod(shape))
    axis = len(shape) - 1
    columns = shape[axis]
    while axis > 1 and columns * shape[axis - 1] <= LONGEST_ROW:
        axis -= 1
        columns *= shape[axis]
    return int(np.prod(shape[:axis])), columns


def generator_for(seed: int, name: str) -> np.random.Generator:
    """The generator that samples a tensor: the same for its base and all experts."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def sampled_rows(
    count: int, row_bytes: int, budget: int, generator: np.random.Generator
) -> Indices:
    """Increasing numbers of rows that take about ``budget`` bytes; all of them if they fit."""
    if count * row_bytes <= budget or count <= PLACES:
        return np.arange(count)
    run = min(max(1, PAGE // max(row_bytes, 1)), max(1, count // PLACES))
    places = min(max(PLACES, budget // (run * row_bytes)), count // run)
    starts = np.sort(generator.choice(count // run, size=places, replace=False)) * run
    return np.asarray((starts[:, None] + np.arange(run)).ravel())


class RowReader:
    """Reads rows, and counts the bytes that this took.

    Attributes:
        size: Bytes read so far.
        odd: Numbers among them that were not finite, which are given as zero.
    """

    def __init__(self) -> None:
        self.size = 0
        self.odd = 0

    def rows(self, source: Checkpoint, name: str, indices: Indices) -> Rows | None:
        """Rows of a tensor as :func:`matrix_view` sees it, ``(indices, columns)``.

        None for a tensor that a policy makes when it is read, which is not stored anywhere.
        """
        if isinstance(source, Aligned):
            if name in source.made:
                return self._read(source, name, indices) if name in source.realigned else None
            return self.rows(source.origin, source.name_in_origin(name), indices)
        info = source.tensors[name]
        if isinstance(source, AdaptedCheckpoint):
            return self._adapted(source, name, indices)
        if type(source) is Checkpoint:
            return self._stored(info, indices)
        return self._read(source, name, indices)

    def _stored(self, info: TensorInfo, indices: Indices) -> Rows:
        """Rows from a file, by ranges of its bytes."""
        columns = matrix_view(info.shape)[1]
        width = columns * ITEMSIZE[info.dtype]
        runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        handle = os.open(info.file, os.O_RDONLY)
        try:
            raw = b"".join(
                os.pread(handle, len(run) * width, info.start + int(run[0]) * width)
                for run in runs
                if len(run)
            )
        finally:
            os.close(handle)
        self.size += len(raw)
        return self._finite(decoded(raw, info.dtype)).reshape(len(indices), columns)

    def _adapted(self, source: AdaptedCheckpoint, name: str, indices: Indices) -> Rows:
        """Rows of a stored matrix with the adapter's low-rank change."""
        stored = self._stored(source.tensors[name], indices)
        if name not in source.changes:
            return stored
        change, transposed = source.changes[name]
        outer, inner = (change.down, change.up) if transposed else (change.up, change.down)
        if not transposed and matrix_view(outer.shape)[0] == matrix_view(source.shape(name))[0]:
            left = self._stored(outer, indices)
            right = self._whole(inner)
        elif transposed:
            left = self._whole(outer).T[indices]
            right = self._whole(inner).T
        else:
            return self._read(source, name, indices)
        return np.asarray(stored + change.scale * (left @ right), dtype=np.float32)

    def _whole(self, info: TensorInfo) -> Rows:
        """A small tensor."""
        return self._stored(info, np.arange(matrix_view(info.shape)[0]))

    def _read(self, source: Checkpoint, name: str, indices: Indices) -> Rows:
        """Rows of a source of another kind, which may have to read the whole tensor."""
        import torch

        tensor = source.read(name).detach()
        self.size += tensor.nbytes
        rows = tensor.reshape(matrix_view(tensor.shape))
        chosen = rows[torch.from_numpy(indices).to(rows.device)].float().cpu().numpy()
        return self._finite(chosen)

    def _finite(self, numbers: Rows) -> Rows:
        """The numbers, with zero for those that are not finite, in place."""
        odd = numbers.size - int(np.count_nonzero(np.isfinite(numbers)))
        if not odd:
            return numbers
        self.odd += odd
        return np.nan_to_num(numbers, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def decoded(raw: bytes, dtype: str) -> Rows:
    """Stored floating numbers as fp32."""
    if dtype == "bfloat16":
        wide = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    return np.frombuffer(raw, dtype=np.dtype(dtype)).astype(np.float32)
