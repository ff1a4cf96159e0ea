"""Arrays as text for the trial log: exact for points, compact for scores of items."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import numpy.typing as npt

from mergesearch.merging import RunFolderError
from mergesearch.merging.foreign.shown import shown

#: The most scores of items that a text may hold.
MOST_ITEMS = 1 << 26


def encode_array(array: npt.NDArray[np.float64]) -> str:
    """Encode a float64 array as base64 text, exactly."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f8").tobytes()).decode()


def decode_array(text: str, where: str = "record") -> npt.NDArray[np.float64]:
    """Inverse of :func:`encode_array`.

    Args:
        text: As it was encoded.
        where: Where it stands, as errors name it.

    Raises:
        RunFolderError: If the text is no such array, or a number in it is not finite.
    """
    try:
        array = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8")
    except ValueError:  # letters outside the alphabet, or bytes that are no whole numbers
        raise RunFolderError(
            f"{where}: expected numbers in base64, received {shown(text, 40)}"
        ) from None
    if not np.all(np.isfinite(array)):
        raise RunFolderError(f"{where}: expected finite numbers, received others")
    return array.astype(np.float64)


def pack_items(scores: npt.NDArray[np.float64]) -> str:
    """Compress scores of items to text.

    Scores of 0 and 1 take about a bit each; others are kept as float32.
    """
    binary = bool(np.all((scores == 0) | (scores == 1)))
    data = np.packbits(scores.astype(bool)) if binary else scores.astype("<f4")
    text = base64.b64encode(zlib.compress(data.tobytes(), 1)).decode()
    return f"{'b' if binary else 'f'}{scores.size}:{text}"


def unpack_items(text: str, where: str = "record") -> npt.NDArray[np.float64]:
    """Inverse of :func:`pack_items`.

    Args:
        text: As it was packed.
        where: Where it stands, as errors name it.

    Raises:
        RunFolderError: If the text is damaged; never more is unpacked than it says.
    """
    head, _, body = text.partition(":")
    count = int(head[1:]) if head[1:].isdecimal() and len(head) < 12 else -1
    if head[:1] not in ("b", "f") or not 0 <= count <= MOST_ITEMS:
        raise RunFolderError(f"{where}: expected packed scores, received {shown(text, 40)}")
    size = (count + 7) // 8 if head[0] == "b" else 4 * count
    data = _unzipped(body, size)
    if data is None:
        raise RunFolderError(
            f"{where}: expected {count} packed scores, received damaged ones {shown(text, 40)}"
        )
    if head[0] == "b":
        return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(np.float64)
    return np.frombuffer(data, "<f4").astype(np.float64)


def _unzipped(body: str, size: int) -> bytes | None:
    """The bytes of a packed text, or None where they are not ``size`` whole ones."""
    unzip = zlib.decompressobj()
    try:
        data = unzip.decompress(base64.b64decode(body, validate=True), size + 1)
        # What is left checks the sum at the end.
        data += unzip.decompress(unzip.unconsumed_tail, 1) if not unzip.eof else b""
    except (ValueError, zlib.error):
        return None
    return data if unzip.eof and len(data) == size else None
