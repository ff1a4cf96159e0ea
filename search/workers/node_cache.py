"""The folder in which a node of a cluster keeps prepared weights."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mergesearch.merging import InputError
from mergesearch.search.workers.messages import NODE_CACHE


def node_cache_folder() -> Path:
    """This host's folder for prepared weights, below its folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"mergesearch-{os.getuid()}" / "arenas"


def node_cache() -> Path:
    """:func:`node_cache_folder`, created if it is missing.

    Raises:
        InputError: If somebody else may write there: its files are taken for this study's weights.
    """
    path = node_cache_folder()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    owner = path.parent.stat().st_uid
    mode = path.parent.stat().st_mode & 0o077
    if owner != os.getuid() or mode:
        raise InputError(
            f"workers.cache: expected {path.parent} to be this user's alone, found owner {owner} "
            f"and mode {mode:o} for others; remove it or set workers.cache"
        )
    path.mkdir(exist_ok=True)
    return path


def arena_folder(arenas: str) -> Path:
    """The folder of arenas on this node, from that of a worker's spec."""
    return node_cache() if arenas == NODE_CACHE else Path(arenas)
