"""What stands at a path: one table, a table for each split, or files in folders of classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mergesearch.evaluators.data.table_files import (
    READERS,
    class_names,
    read_datasets_table,
    read_table_file,
)
from mergesearch.merging import InputError
from mergesearch.merging.foreign.file_kinds import kind_of
from mergesearch.merging.foreign.shown import cut, path_shown

if TYPE_CHECKING:
    import pyarrow as pa

#: Columns of a folder of pictures or recordings, whatever the study calls them.
IMAGE = "image"
AUDIO = "audio"
CLASS = "label"
#: Column of such a folder -> suffixes of its files.
SUFFIXES = {
    IMAGE: frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}),
    AUDIO: frozenset({".wav", ".flac", ".ogg", ".mp3"}),
}


@dataclass(frozen=True, eq=False)
class RawTable:
    """A table as it is on disk.

    Attributes:
        table: The rows.
        names: Column -> names of its classes, where the file says so.
        folder: Where paths of pictures and recordings start.
        media: Of a folder of classes, the column of its files, :data:`IMAGE` or :data:`AUDIO`; the
            other is :data:`CLASS`.
    """

    table: pa.Table
    folder: Path
    names: Mapping[str, list[str]] = field(default_factory=dict)
    media: str = ""


def read_layout(path: Path, texts: Collection[str], where: str) -> dict[str | None, RawTable]:
    """Split -> table of a path; the key is None where the path names no splits.

    Args:
        path: A table, a folder of tables or of classes, or a folder that ``save_to_disk`` wrote.
        texts: Columns that stay texts, even where they look like numbers.
        where: Key of the study file, for messages.

    Raises:
        InputError: If there is nothing there that can be read.
    """
    if path.is_file():
        return {None: _file(path, texts, where)}
    if not path.is_dir():
        raise InputError(
            f"{where}: expected a file or a folder of items, found no {path}; paths start at the "
            "study file"
        )
    if (path / "state.json").is_file():
        return {None: _dataset(path, where)}
    children = sorted(path.iterdir())
    parts = [child for child in children if (child / "state.json").is_file()]
    if parts:
        return {part.name: _dataset(part, where) for part in parts}
    files = [child for child in children if child.suffix.lower() in READERS]
    if files:
        return {file.stem: _file(file, texts, where) for file in files}
    for media in SUFFIXES:
        if any(_files_of(child, media) for child in children):
            return {None: _class_folder(path, media)}
        splits = [child for child in children if child.is_dir() and _holds_classes(child, media)]
        if splits:
            return {split.name: _class_folder(split, media) for split in splits}
    raise InputError(
        f"{where}: {path}: expected a folder of {', '.join(READERS)} files, of images or "
        "recordings in folders of their classes, or one that save_to_disk wrote, found none of "
        "them"
    )


def _file(path: Path, texts: Collection[str], where: str) -> RawTable:
    if path.suffix.lower() not in READERS:
        raise InputError(
            f"{where}: {path}: expected a file of {', '.join(READERS)}, received {kind_of(path)}; "
            "export it as one of these"
        )
    return RawTable(read_table_file(path, texts, where), path.parent)


def _dataset(folder: Path, where: str) -> RawTable:
    try:
        table = read_datasets_table(folder)
        names = class_names(folder)
    except InputError as error:
        raise InputError(
            f"{where}: {path_shown(folder)}: expected a readable folder of save_to_disk, received: "
            f"{cut(str(error), 200)}"
        ) from None
    if not table.num_rows:
        raise InputError(f"{where}: {folder}: expected items, received an empty split")
    return RawTable(table, folder, names)


def _class_folder(folder: Path, media: str) -> RawTable:
    """Pictures or recordings in folders that are named after their classes."""
    import pyarrow as pa

    found = [
        (str(file), child.name)
        for child in sorted(folder.iterdir())
        for file in _files_of(child, media)
    ]
    files = pa.array([file for file, _ in found], pa.string())
    labels = pa.array([label for _, label in found], pa.string())
    return RawTable(pa.table({media: files, CLASS: labels}), folder, media=media)


def _holds_classes(folder: Path, media: str) -> bool:
    return any(_files_of(child, media) for child in folder.iterdir())


def _files_of(folder: Path, media: str) -> list[Path]:
    """Pictures or recordings of a folder, in the order of their names; none where it is a file."""
    if not folder.is_dir():
        return []
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES[media]]
