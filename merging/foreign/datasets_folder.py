"""Folders that ``Dataset.save_to_disk`` wrote: their description, and their Arrow files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.json_text import read_json
from mergesearch.merging.foreign.library import reason
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.paths import is_file
from mergesearch.merging.foreign.shown import path_shown, shown

if TYPE_CHECKING:
    import pyarrow as pa

STATE = "state.json"
INFO = "dataset_info.json"
_AGAIN = "write the folder again by save_to_disk"


def data_files(folder: Path) -> list[Path]:
    """The Arrow files of a split, all of them in its folder.

    Raises:
        InputError: If ``state.json`` cannot be read, or names anything else.
    """
    where = path_shown(folder / STATE)
    state = Node(read_json(folder / STATE), where)
    listed = state.at("_data_files").elements()
    names = [entry.at("filename").text() for entry in listed]
    for name in names:
        if Path(name).name != name or not is_file(folder / name):
            raise InputError(
                f"{where}: expected names of files in its folder, received {shown(name)}; {_AGAIN}"
            )
    if len({*names}) < len(names):
        raise InputError(f"{where}: expected each file once, received one twice; {_AGAIN}")
    return [folder / name for name in names]


def features_of(folder: Path) -> Mapping[str, Any]:
    """Column -> its description; empty where a folder describes none.

    Raises:
        InputError: If ``dataset_info.json`` cannot be read.
    """
    if not is_file(folder / INFO):
        return {}
    about = Node(read_json(folder / INFO), path_shown(folder / INFO))
    return about.get("features").mapping() if about.has("features") else {}


def class_names(folder: Path) -> dict[str, list[str]]:
    """Column -> names of its classes, for columns of class numbers or of lists of them.

    Raises:
        InputError: If the description cannot be read.
    """
    found: dict[str, list[str]] = {}
    for column, feature in features_of(folder).items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            where = f"{path_shown(folder / INFO)}: features: {shown(column)}"
            names = Node(inner, where).at("names").elements()
            found[column] = [name.text() for name in names]
    return found


def read_arrow(file: Path, *, full: bool = True) -> pa.Table:
    """Read the table of a file of Arrow's stream format, which is mapped into memory.

    Args:
        file: The file.
        full: Whether every offset and text is checked, and not only those at the ends: what reads
            a damaged table may leave its memory.

    Raises:
        InputError: If it is damaged.
    """
    import pyarrow as pa

    try:
        if not file.stat().st_size:
            raise InputError(f"{path_shown(file)}: expected an Arrow file, received an empty one")
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
        table.validate(full=full)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, pa.ArrowException) as error:
        # A damaged length asks for terabytes: pyarrow's MemoryError is an ArrowException.
        raise InputError(
            f"{path_shown(file)}: expected an Arrow file, received {reason(error)}; {_AGAIN}"
        ) from None
    return table


def read_split(folder: Path, *, full: bool = True) -> pa.Table:
    """Read all Arrow files of a split.

    Raises:
        InputError: If they are damaged, or have other columns than each other.
    """
    import pyarrow as pa

    tables = [read_arrow(file, full=full) for file in data_files(folder)]
    try:
        return pa.concat_tables(tables) if tables else pa.table({})
    except pa.ArrowException as error:
        raise InputError(
            f"{path_shown(folder)}: expected files of the same columns, received {reason(error)}"
        ) from None
