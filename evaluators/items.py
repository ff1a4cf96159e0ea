"""Items on disk: a ``datasets`` folder read through its Arrow files, checked without loading ``datasets``.

The three splits must be disjoint: an item that the search has seen would flatter the winner.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.base import Split
from merging import InputError

if TYPE_CHECKING:
    import pyarrow as pa


def check_items(
    data: Path, splits: Mapping[Split, str], columns: Mapping[str, str | None], where: str
) -> dict[Split, set[str]]:
    """Refuse missing, empty or overlapping splits and missing columns; returns the domains of each split.

    Args:
        data: Folder written by ``DatasetDict.save_to_disk``.
        splits: Role -> name of the split in the folder.
        columns: ``input``, ``label``, ``domain``, ``id`` -> column; domain and id may be None.
        where: Key of the study file, for messages.

    Raises:
        InputError: In one line.
    """
    tables = {role: _table(data, name, columns, where) for role, name in splits.items()}
    for role, table in tables.items():
        if not table.num_rows:
            raise InputError(f"{where}: {data}: expected items in split {splits[role]!r}, received an empty one")
    ids = {role: _ids(table, columns) for role, table in tables.items()}
    for one, other in combinations(ids, 2):
        shared = ids[one] & ids[other]
        if shared:
            raise InputError(
                f"{where}: {data}: expected disjoint splits, received {len(shared)} items in both {splits[one]!r} and "
                f"{splits[other]!r}, for example {min(shared)!r}"
            )
    domain = columns["domain"]
    names = _domain_names(data, splits, domain)
    return {
        role: set() if domain is None else {names[value] if names else str(value) for value in _values(table, domain)}
        for role, table in tables.items()
    }


def load_columns(data: Path, split: str, columns: Mapping[str, str | None]) -> dict[str, Any]:
    """The columns of a split as arrays, by role; label classes as numbers, domains as names."""
    from datasets import ClassLabel, load_from_disk

    dataset = load_from_disk(str(data / split)).with_format("numpy")
    loaded = {role: dataset[:][column] for role, column in columns.items() if column is not None}
    domain = columns["domain"]
    if domain is not None and isinstance(dataset.features[domain], ClassLabel):
        loaded["domain"] = dataset.features[domain].int2str(loaded["domain"].tolist())
    return loaded


def _table(data: Path, split: str, columns: Mapping[str, str | None], where: str) -> pa.Table:
    import pyarrow as pa

    folder = data / split
    if not data.is_dir():
        raise InputError(f"{where}: expected a folder written by save_to_disk, found no {data}")
    try:
        files = json.loads((folder / "state.json").read_text())["_data_files"]
        tables = [pa.ipc.open_stream(folder / file["filename"]).read_all() for file in files]
        table = pa.concat_tables(tables) if tables else pa.table({})
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        known = sorted(path.name for path in data.iterdir() if (path / "state.json").is_file())
        raise InputError(
            f"{where}: {data}: expected a readable split {split!r}, received {type(error).__name__}; "
            f"splits there: {known}"
        ) from None
    missing = sorted(column for column in columns.values() if column and column not in table.column_names)
    if missing:
        raise InputError(
            f"{where}: {folder}: expected a column {missing[0]!r}, received only {sorted(table.column_names)}"
        )
    return table


def _ids(table: pa.Table, columns: Mapping[str, str | None]) -> set[str]:
    """Identity of every item: its id, or a hash of its input."""
    column = columns["id"]
    if column is not None:
        return {str(value) for value in _values(table, column)}
    source = columns["input"]
    assert source is not None  # every evaluator reads something
    return {hashlib.sha256(repr(value).encode()).hexdigest()[:16] for value in _values(table, source)}


def _values(table: pa.Table, column: str) -> list[Any]:
    values: list[Any] = table.column(column).to_pylist()
    return values


def _domain_names(data: Path, splits: Mapping[Split, str], domain: str | None) -> list[str]:
    """Names of a domain column that is stored as class numbers, else nothing."""
    info = data / next(iter(splits.values())) / "dataset_info.json"
    if domain is None or not info.is_file():
        return []
    feature = json.loads(info.read_text()).get("features", {}).get(domain, {})
    names: list[str] = feature.get("names", []) if feature.get("_type") == "ClassLabel" else []
    return names
