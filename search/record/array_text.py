"""Arrays as text for the trial log: exact for points, compact for scores of items."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import numpy.typing as npt


def encode_array(array: npt.NDArray[np.float64]) -> str:
    """Encode a float64 array as base64 text, exactly."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f8").tobytes()).decode()


def decode_array(text: str) -> npt.NDArray[np.float64]:
    """Inverse of :func:`encode_array`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)


def pack_items(scores: npt.NDArray[np.float64]) -> str:
    """Compress scores of items to text.

    Scores of 0 and 1 take about a bit each; others are kept as float32.
    """
    binary = bool(np.all((scores == 0) | (scores == 1)))
    data = np.packbits(scores.astype(bool)) if binary else scores.astype("<f4")
    text = base64.b64encode(zlib.compress(data.tobytes(), 1)).decode()
    return f"{'b' if binary else 'f'}{scores.size}:{text}"


def unpack_items(text: str) -> npt.NDArray[np.float64]:
    """Inverse of :func:`pack_items`."""
    head, _, body = text.partition(":")
    data = zlib.decompress(base64.b64decode(body))
    count = int(head[1:])
    if head[0] == "b":
        return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(np.float64)
    return np.frombuffer(data, "<f4").astype(np.float64)
