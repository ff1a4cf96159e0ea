"""The record of a judge: one line of JSON for each model, each choice and each choice taken back.

``judging.jsonl`` in the run folder is only ever appended to, and every line is on the disk before
anything follows from it. All that is shown and scored is a function of it, so a study that was
killed goes on with the pairs that are open. Pictures lie beside it in ``judging/``, named after
their digests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergesearch.merging import RunFolderError
from mergesearch.merging.checkpoints.atomic import sync, write_atomically
from mergesearch.merging.foreign.shown import path_shown
from mergesearch.search.judging.shapes import check_event
from mergesearch.search.record.journal_lines import lines_from, parse_line
from mergesearch.search.record.storage import cut_torn_line


class JudgingRecord:
    """Appends whole lines, each synced.

    Args:
        folder: The run folder; who writes must hold it as its driver.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "judging.jsonl"
        self._pictures = folder / "judging"

    def begin(self, study: str) -> None:
        """Go on with the record of a study; one of another study is moved aside.

        A folder takes another study in its place as long as no trial of the first has a result.

        Args:
            study: Digest of all that the outputs depend on.
        """
        self.mend()
        first = next(self.events(), None)
        if first is not None and first.get("study") != study:
            kept = sorted(self._path.parent.glob("judging-*.jsonl"))
            self._path.rename(self._path.with_name(f"judging-{len(kept) + 1}.jsonl"))
            first = None
        if first is None:
            self.append({"event": "study", "study": study})

    def mend(self) -> None:
        """Cut off a last line that a crash tore; the next one would join it."""
        if self._path.is_file():
            cut_torn_line(self._path)

    def events(self) -> Iterator[dict[str, Any]]:
        """What is recorded, in order, without a torn last line.

        Raises:
            RunFolderError: If the file was damaged by others.
        """
        where = path_shown(self._path)
        if not os.path.lexists(self._path):
            return
        if not self._path.is_file():
            raise RunFolderError(
                f"{where}: expected a file, received a folder, a pipe or a broken link; move it"
            )
        for number, line in enumerate(lines_from(self._path, 0), 1):
            place = f"{where}: line {number}"
            try:
                yield check_event(parse_line(line, place), place)
            except RunFolderError as error:
                raise RunFolderError(f"{error}; restore the file from a copy") from None

    def append(self, event: Mapping[str, Any]) -> None:
        """Add a line and wait until it is on the disk.

        Raises:
            OSError: If it could not be written; nothing of it is in the file then.
        """
        line = json.dumps(event, ensure_ascii=True).encode() + b"\n"
        is_new = not self._path.exists()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, line)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            sync(self._path.parent)

    def keep_picture(self, name: str, content: bytes) -> None:
        """Store a picture, once."""
        path = self._pictures / name
        if not path.exists():
            self._pictures.mkdir(exist_ok=True)
            write_atomically(path, content)

    def picture(self, name: str) -> bytes:
        """A picture's file.

        Raises:
            OSError: If it is gone.
        """
        return (self._pictures / name).read_bytes()


def _write_all(descriptor: int, line: bytes) -> None:
    while line:
        line = line[os.write(descriptor, line) :]
