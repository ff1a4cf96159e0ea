"""What items are known by: their ids, or hashes of their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.data.columns import LISTS, TEXTS, Columns, holds_media, inputs
from mergesearch.evaluators.data.media import media_bytes

if TYPE_CHECKING:
    import pyarrow as pa


def identities(table: pa.Table, columns: Columns) -> list[str]:
    """Identity of every item: its id, or a hash of its first input."""
    identifier = columns.get("id")
    if identifier is not None:
        return [str(value) for value in table.column(identifier).to_pylist()]
    role, column = next(iter(inputs(columns).items()))
    first = table.column(column)
    if role in TEXTS:
        return [text_identity(text) for text in first.to_pylist()]
    if role in LISTS:
        return [text_identity("\n".join(words)) for words in first.to_pylist()]
    if holds_media(first.type):
        return [_hash(media_bytes(item)) for item in first.to_pylist()]
    return [_hash(row.tobytes()) for chunk in first.chunks for row in _rows(chunk)]


def text_identity(text: str) -> str:
    """Identity of an item without an id: a hash of its text."""
    return _hash(text.encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _rows(array: pa.Array) -> Iterator[npt.NDArray[np.float64]]:
    """Yield the numbers of each row, flat, whatever their nesting and type.

    They are read from the buffers, because images are large.
    """
    import pyarrow as pa

    bounds: npt.NDArray[Any] = np.arange(len(array) + 1)
    while True:
        if isinstance(array, pa.ExtensionArray):  # so `datasets` stores arrays of two axes or more
            array = array.storage
        elif isinstance(array, pa.FixedSizeListArray):
            bounds = bounds * array.type.list_size
            array = array.values
        elif isinstance(array, pa.ListArray | pa.LargeListArray):
            bounds = np.from_dlpack(array.offsets)[bounds]
            array = array.values
        else:
            break
    # Not `to_numpy`, which imports pandas.
    numbers = np.from_dlpack(
        array if not array.null_count else array.cast("float64").fill_null(float("nan"))
    )
    for start, stop in pairwise(bounds):
        yield numbers[start:stop].astype(np.float64)
