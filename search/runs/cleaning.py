"""Prepared weights beside runs that no run has used, found by when they were last used.

Runs share the folder ``.arenas``: arenas, each an index with its files, and intermediate results in
``shared``. Whoever opens one marks it as used. It belongs to a run if that was while the run went
on; what belongs to none, because its run is gone, can be prepared again at any time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mergesearch.merging import InputError
from mergesearch.merging.foreign.json_text import parse_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.reading import decode
from mergesearch.search.record.run_folder import RunFolder

#: Bytes of the first event that are read.
EVENT_LIMIT = 1 << 16
#: Clocks of a file server and of this machine may differ by so many seconds.
SLACK = 120.0


@dataclass(frozen=True)
class Unused:
    """Prepared weights that belong to no run.

    Attributes:
        name: Of the file, or of the arena's files without their suffixes.
        files: All of them.
        bytes: Their size.
        last_used: Seconds since 1970.
    """

    name: str
    files: tuple[Path, ...]
    bytes: int
    last_used: float


def unused_weights(runs: Path) -> list[Unused]:
    """What lies beside the runs of a folder and belongs to none of them, largest first."""
    spans = [_span(path.parent) for path in runs.glob("*/study.yaml")]
    found = [
        each
        for each in _kept(runs / ".arenas")
        if not any(start <= each.last_used <= end for start, end in spans)
    ]
    return sorted(found, key=lambda each: -each.bytes)


def remove(unused: Sequence[Unused]) -> None:
    """Remove files; processes that have them open keep them until they end."""
    for each in unused:
        for file in each.files:
            file.unlink(missing_ok=True)


def _span(run: Path) -> tuple[float, float]:
    """From the beginning of a run to its last change, or for ever while a driver holds it."""
    if RunFolder(run).driver() is not None:
        return -math.inf, math.inf
    try:
        changes = [file.lstat().st_mtime for file in run.iterdir()]
    except OSError:  # nobody can say when it went on
        return -math.inf, math.inf
    return _began(run, min(changes)) - SLACK, max(changes) + SLACK


def _began(run: Path, otherwise: float) -> float:
    """When the first event of a run was recorded."""
    events = run / "events.jsonl"
    try:
        if not events.is_file():  # a pipe would wait for ever
            return -math.inf
        with events.open("rb") as file:
            line = file.readline(EVENT_LIMIT)
        where = str(events)
        first = Node(parse_json(decode(line, where), where), where).at("time").text()
        return min(datetime.fromisoformat(first).timestamp(), otherwise)
    except (OSError, ValueError, OverflowError, InputError):
        # Without events nobody can say: it may have begun at any time.
        return -math.inf


def _kept(folder: Path) -> Iterator[Unused]:
    """Arenas and shared results of a folder."""
    arenas: dict[str, list[Path]] = {}
    for file in folder.glob("*.*"):
        arenas.setdefault(file.name.split(".")[0], []).append(file)
    for key, files in arenas.items():
        sheet = folder / f"{key}.json"
        yield _unused(key, files, sheet if sheet in files else files[0])
    for file in (folder / "shared").glob("*"):
        yield _unused(f"shared/{file.name}", [file], file)


def _unused(name: str, files: Sequence[Path], marked: Path) -> Unused:
    size = sum(file.stat().st_size for file in files)
    status = marked.stat()
    last_used = max(status.st_atime, status.st_mtime)
    return Unused(name, tuple(files), size, min(last_used, time.time()))
