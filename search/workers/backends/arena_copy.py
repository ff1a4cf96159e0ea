"""A cluster prepares weights once: one node does, the others copy what it has prepared.

Preparing reads every expert and may take hours; a copy takes as long as the network needs for a few
files. Nodes of a cluster need no folder in common, so files travel through Ray, in chunks that are
written as they come. The sheet of an arena is copied last, so that a reader sees a whole arena or
none, and what arrives is compared with its hash like every arena that is opened. Where nodes do
have the folder in common, waiting is all that is needed, and no lock must reach across nodes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.resident.arena import arena_key
from mergesearch.merging.resident.arena_files import PART, locked
from mergesearch.merging.tensors.progress import Progress
from mergesearch.search.workers.loading import LoadingReporter
from mergesearch.search.workers.messages import WorkerSpec
from mergesearch.search.workers.node_cache import arena_folder
from mergesearch.search.workers.resident_model import preparing_place

#: Bytes that are sent at a time; two such chunks are on their way.
CHUNK = 32 * 2**20
#: Files beside an arena that are not part of it.
_NOT_COPIED = (PART, ".stamp", ".lock")

#: Path below the folder, size in bytes, and time of change.
FileEntry = tuple[str, int, int]


class PreparedOnce:
    """Lets the workers of one node prepare, and those of others wait and copy.

    Args:
        ray: Ray, connected.
        spec: What workers are built from; those without weights may all load at once.
    """

    def __init__(self, ray: Any, spec: WorkerSpec) -> None:
        self._ray = ray
        self._applies = bool(spec.template.experts)
        self._arenas = spec.arenas
        self._source: str | None = None
        self._prepared = False
        self._server: Any = None

    def permit(self, node: str, loading: Collection[str]) -> tuple[bool, Any]:
        """Whether workers of a node may load now, and the server that they copy from, if any.

        Args:
            node: Id of the node.
            loading: Ids of the nodes on which workers load.
        """
        if not self._applies:
            return True, None
        if self._prepared:
            return True, None if node == self._source else self._open_server()
        if self._source not in loading:  # none has begun, or all that had are lost
            self._source = node
        return node == self._source, None

    def note_loaded(self, node: str) -> None:
        """Note that a worker of a node has loaded: the others may copy from there."""
        if not self._prepared:
            self._source = node
            self._prepared = True

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._ray.kill(self._server, no_restart=True)
            self._server = None

    def _open_server(self) -> Any:
        if self._server is None:
            strategies = self._ray.util.scheduling_strategies
            there = strategies.NodeAffinitySchedulingStrategy(self._source, soft=False)
            remote = self._ray.remote(num_cpus=0, scheduling_strategy=there)(ArenaServer)
            self._server = remote.remote(self._arenas)
        return self._server


class ArenaServer:
    """Hands out the files of the arenas that a node has prepared; a Ray actor on that node.

    Args:
        arenas: The workers' folder of arenas.
    """

    def __init__(self, arenas: str) -> None:
        self._folder = arena_folder(arenas)

    def files(self, key: str) -> list[FileEntry]:
        """Files of the arena of a key, the sheet last."""
        folder = self._folder
        found = [
            file
            for entry in folder.glob(f"{key}.*")
            for file in ([entry] if entry.is_file() else entry.rglob("*"))
            if file.is_file() and not file.name.endswith(_NOT_COPIED)
        ]
        found.sort(key=lambda file: (file == folder / f"{key}.json", file))
        return [
            (str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns)
            for file in found
        ]

    def read(self, path: str, offset: int) -> bytes:
        """A chunk of a file."""
        with (self._folder / path).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK)


def copy_if_missing(ray: Any, server: Any, spec: WorkerSpec, loading: LoadingReporter) -> None:
    """Copy the arena of a study from another node's server, if there is one.

    What cannot be copied is prepared here.
    """
    if server is None:
        return
    with contextlib.suppress(OSError, InputError, ray.exceptions.RayError):
        loading.begin("copying weights from another node")
        folder = arena_folder(spec.arenas)
        key = arena_key(spec.template, spec.rows, preparing_place(spec))
        copy_arenas(ray, server, key, folder, loading)


def copy_arenas(ray: Any, server: Any, key: str, folder: Path, progress: Progress) -> None:
    """Copy the arena of a key from another node, unless it is here already.

    One worker of a node copies, the others wait for it.

    Args:
        ray: Ray, connected.
        server: The :class:`ArenaServer` of the node that has it.
        key: Names the arena.
        folder: Where this node keeps arenas.
        progress: Told the chunks and bytes that are done.
    """

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        entries: list[FileEntry] = ray.get(server.files.remote(key))
        total = sum(size for _, size, _ in entries)
        done = 0
        for entry in entries:
            path, size, _ = entry
            if not (folder / path).exists():
                _copy_file(ray, server, entry, folder, partial(_report, progress, done, total))
            done += size
            _report(progress, done, total, 0)


def _report(progress: Progress, before: int, total: int, here: int) -> None:
    """Tell progress of a copy in chunks, from bytes: before this file, in total, and of it."""
    done = before + here
    progress(-(-done // CHUNK), -(-total // CHUNK), done)


def _copy_file(
    ray: Any, server: Any, entry: FileEntry, folder: Path, progress: Callable[[int], None]
) -> None:
    """Copy a file and its time; it appears under its name when it is whole.

    ``progress`` is told the bytes of it that are done.
    """
    path, size, changed = entry
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}{PART}")
    offsets = list(range(0, size, CHUNK))
    sent = [server.read.remote(path, offset) for offset in offsets[:2]]
    with part.open("wb") as file:
        for number, offset in enumerate(offsets):
            file.write(ray.get(sent.pop(0)))
            if number + 2 < len(offsets):
                sent.append(server.read.remote(path, offsets[number + 2]))
            progress(offset)
        file.flush()
        os.fsync(file.fileno())
    os.utime(part, ns=(changed, changed))
    os.replace(part, target)
