"""SHA-256 of stored tensors, computed once for every state of a file.

Hashing reads all weights at one to two gigabytes a second. What it gave is kept in the user's cache
folder (``$MERGESEARCH_CACHE``, else ``$XDG_CACHE_HOME/mergesearch``, else ``~/.cache/mergesearch``)
under the file's path, size, inode and times; the system sets the time of change itself, so a file
that was touched is read again. A file that changed within the last seconds is not kept: a clock's
tick may hide a second change.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mergesearch.merging.checkpoints.atomic import write_atomically
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo, hash_bytes
from mergesearch.merging.foreign.own_json import read_own_json, with_checksum

#: Seconds for which a file must have been left alone.
SETTLED = 2.0


def tensor_digests(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """SHA-256 of the bytes of every tensor, in hexadecimal."""
    digests: dict[str, str] = {}
    for file in dict.fromkeys(info.file for info in tensors.values()):
        digests |= _file_digests(
            file, {name: info for name, info in tensors.items() if info.file == file}
        )
    return {name: digests[name] for name in tensors}


def _file_digests(file: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    stamp = _stamp(file)
    cache = _cache_folder() / f"{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]}.json"
    known = _read(cache)
    if set(known) >= set(tensors):
        return {name: known[name] for name in tensors}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves the interpreter's lock
        digests = dict(zip(tensors, pool.map(hash_bytes, tensors.values()), strict=True))
    if _stamp(file) == stamp and time.time() - max(stamp[-2:]) / 1e9 > SETTLED:
        _keep({**known, **digests}, cache)
    return digests


def _stamp(file: Path) -> tuple[str, int, int, int, int, int]:
    """The state of a file: path, device, inode, size, and two times in nanoseconds."""
    status = file.stat()
    return (
        str(file.resolve()),
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _cache_folder() -> Path:
    own = os.environ.get("MERGESEARCH_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(home) / "mergesearch").expanduser() / "digests"


def _read(cache: Path) -> dict[str, str]:
    digests = (read_own_json(cache) or {}).get("digests")
    if not isinstance(digests, dict):
        return {}
    valid = all(isinstance(value, str) and len(value) == 64 for value in digests.values())
    return digests if valid else {}


def _keep(digests: Mapping[str, str], cache: Path) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps(with_checksum({"digests": dict(digests)})))
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else
