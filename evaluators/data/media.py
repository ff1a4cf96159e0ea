"""Columns of pictures and recordings: each item is the bytes of a file, or the path of one."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging import InputError
from mergesearch.merging.foreign.paths import is_file
from mergesearch.merging.foreign.shown import path_shown

if TYPE_CHECKING:
    import pyarrow as pa

#: What is opened: a path, or bytes.
Opened = str | io.BytesIO


def media_array(
    values: Sequence[Any], folder: Path, where: str, what: str, probe: Callable[[Opened], float]
) -> pa.Array:
    """A struct of ``bytes`` and ``path`` for every item ``(items,)``, one of which is null.

    It also has ``size``, the number that the probe returns.

    Args:
        values: Bytes, a path, or what `datasets` stores: a mapping with ``bytes`` and ``path``.
        folder: Where relative paths start.
        where: Key of the study file and column, for messages.
        what: What the items are, for messages.
        probe: Opens an item, and returns a number that is kept with it; raises OSError,
            ValueError or SyntaxError if it cannot.

    Raises:
        InputError: If a file is missing, or cannot be opened.
    """
    import pyarrow as pa

    kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.string()), ("size", pa.float64())])
    return pa.array([_checked(value, folder, where, what, probe) for value in values], kind)


def media_bytes(item: Mapping[str, Any]) -> bytes:
    """The bytes of a row of :func:`media_array`."""
    content = item["bytes"]
    return bytes(content) if content is not None else Path(item["path"]).read_bytes()


def _checked(
    value: Any, folder: Path, where: str, what: str, probe: Callable[[Opened], float]
) -> dict[str, Any]:
    """The struct of one item, which can be opened."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes):
        raise InputError(f"{where}: expected a {what} for every item, received none for some")
    path = str(folder / value) if isinstance(value, str) else None
    place = "the bytes of an item" if path is None else path_shown(path)
    if path is not None and not is_file(Path(path)):
        raise InputError(f"{where}: expected a {what}, found no {place}")
    try:
        size = probe(io.BytesIO(value) if isinstance(value, bytes) else str(path))
    except InputError:
        raise
    except Exception as error:  # libraries of pictures and sound raise what they stumble over
        raise InputError(
            f"{where}: {place}: expected a {what}, received "
            f"{type(error).__name__}; mend or remove it"
        ) from None
    return {"bytes": None if path is not None else value, "path": path, "size": size}
