"""JSON files of our own that may be damaged: written with a checksum, and read only whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.json_text import read_json

#: Key of the checksum of all others.
CHECKSUM = "checksum"
_LIMIT = 1 << 30


def with_checksum(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data with a checksum of it."""
    return {**data, CHECKSUM: _checksum(data)}


def read_own_json(file: Path) -> dict[str, Any] | None:
    """What a file holds beside its checksum; None where it is missing or damaged.

    A file without a checksum is one of an earlier version, and is read as it is.
    """
    try:
        data = read_json(file, limit=_LIMIT, unique=True)
    except InputError:
        return None
    if not isinstance(data, dict):
        return None
    checksum = data.pop(CHECKSUM, None)
    return data if checksum in (None, _checksum(data)) else None


def _checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]
