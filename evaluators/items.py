"""Items on disk: a ``datasets`` folder, checked through its Arrow files, and orders of its items.

Checking does not load ``datasets``, which takes seconds to import. The three splits must be
disjoint: an item that the search has seen would flatter the winner.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Batch, ItemSubset, Split
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import pyarrow as pa

#: Roles of columns that hold text.
TEXTS = ("prompt", "target", "text")


def check_items(
    data: Path, splits: Mapping[Split, str], columns: Mapping[str, str | None], where: str
) -> dict[Split, set[str]]:
    """Check splits and columns, and return the domains of each split.

    Missing, empty or overlapping splits and missing or wrong columns are refused.

    Args:
        data: Folder written by ``DatasetDict.save_to_disk``.
        splits: Role -> name of the split in the folder.
        columns: ``label``, ``domain``, ``id`` and inputs -> column; the first three may be None.
            Items without an id are identified by their first input.
        where: Key of the study file, for messages.

    Raises:
        InputError: In one line.
    """
    tables = {role: _table(data, name, columns, where) for role, name in splits.items()}
    ids = {role: _ids(table, columns) for role, table in tables.items()}
    for one, other in combinations(ids, 2):
        shared = ids[one] & ids[other]
        if shared:
            raise InputError(
                f"{where}: {data}: expected disjoint splits, received {len(shared)} items in both "
                f"{splits[one]!r} and {splits[other]!r}, for example {min(shared)!r}"
            )
    return {
        role: _domains(data / splits[role], table, columns["domain"])
        for role, table in tables.items()
    }


def item_identities(
    data: Path, split: str, columns: Mapping[str, str | None], where: str
) -> set[str]:
    """Hashes of the first input of every item, which are the same in every data set.

    Args:
        data: Folder written by ``DatasetDict.save_to_disk``.
        split: Name of the split in the folder.
        columns: As of :func:`check_items`; ids are not read, since two data sets may number alike.
        where: Key of the study file, for messages.

    Raises:
        InputError: If the split or a column is missing.
    """
    return _ids(_table(data, split, columns, where), {**columns, "id": None})


def count_items(data: Path, split: str) -> int:
    """Number of items of a split that :func:`check_items` has seen; reads no item."""
    import pyarrow as pa

    folder = data / split
    count = 0
    for file in json.loads((folder / "state.json").read_text())["_data_files"]:
        with pa.memory_map(str(folder / file["filename"])) as source:
            count += sum(batch.num_rows for batch in pa.ipc.open_stream(source))
    return count


def balanced_order(domains: npt.NDArray[np.str_]) -> npt.NDArray[np.intp]:
    """A fixed random order ``(items,)`` whose every beginning holds the domains in proportion.

    The first items are one of each domain. The order follows from the domains alone, so that all
    workers agree.

    Args:
        domains: Domain of each item ``(items,)``.
    """
    rng = np.random.default_rng(0)
    share = np.empty(len(domains))
    tie = rng.random(len(domains))
    for name in np.unique(domains):
        members = np.flatnonzero(domains == name)
        share[rng.permutation(members)] = np.arange(len(members)) / len(members)
    return np.lexsort([tie, share])


def chosen_indices(domains: npt.NDArray[np.str_], subset: ItemSubset) -> npt.NDArray[np.intp]:
    """Indices of the items of a subset in the split ``(n,)``, rising.

    Args:
        domains: Domain of each item of the split ``(items,)``.
        subset: All, the first so many of the fixed order, or given indices.
    """
    if isinstance(subset, np.ndarray):
        return subset
    return np.sort(balanced_order(domains)[:subset])


def batch_indices(
    domains: npt.NDArray[np.str_], batch: Batch
) -> dict[str, tuple[npt.NDArray[np.intp], int]]:
    """Domain -> indices ``(n,)`` of the items of a batch's share, and the size of the whole batch.

    Indices are those in the split. A domain with fewer items than a batch gives all of them, once.
    A share may be empty.

    Args:
        domains: Domain of each item ``(items,)``.
        batch: Which of them.
    """
    order = balanced_order(domains)
    by_domain = {}
    for index, name in enumerate(np.unique(domains).tolist()):
        pool = order[domains[order] == name][: batch.samples]
        size = len(pool) if batch.size is None else min(batch.size, len(pool))
        first = batch.number * size
        rounds = range(first // len(pool), (first + size - 1) // len(pool) + 1)
        stream = np.concatenate(
            [np.random.default_rng([batch.seed, index, r]).permutation(pool) for r in rounds]
        )
        taken = stream[first - rounds.start * len(pool) :][:size]
        share = taken[batch.share * size // batch.shares : (batch.share + 1) * size // batch.shares]
        by_domain[name] = share, size
    return by_domain


def load_columns(data: Path, split: str, columns: Mapping[str, str | None]) -> dict[str, Any]:
    """Load the columns of a split as arrays by role: classes as numbers, domains as names."""
    from datasets import ClassLabel, load_from_disk

    wanted = {role: column for role, column in columns.items() if column is not None}
    dataset = load_from_disk(str(data / split))
    arrays = {role: column for role, column in wanted.items() if role not in TEXTS}
    values = dataset.with_format("numpy", columns=sorted(set(arrays.values())))[:] if arrays else {}
    loaded = {role: values[column] for role, column in arrays.items()}
    # An array of texts would take the length of the longest one for each of them.
    loaded |= {role: list(dataset[column]) for role, column in wanted.items() if role in TEXTS}
    domain = columns["domain"]
    if domain is not None and isinstance(dataset.features[domain], ClassLabel):
        loaded["domain"] = dataset.features[domain].int2str(loaded["domain"].tolist())
    return loaded


def _table(data: Path, split: str, columns: Mapping[str, str | None], where: str) -> pa.Table:
    """Read a split as it is on disk; it has the columns in question and at least one item."""
    import pyarrow as pa

    folder = data / split
    if not data.is_dir():
        raise InputError(f"{where}: expected a folder written by save_to_disk, found no {data}")
    try:
        files = json.loads((folder / "state.json").read_text())["_data_files"]
        tables = [pa.ipc.open_stream(folder / file["filename"]).read_all() for file in files]
        table = pa.concat_tables(tables) if tables else pa.table({})
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        known = sorted(path.name for path in data.iterdir() if (path / "state.json").is_file())
        raise InputError(
            f"{where}: {data}: expected a readable split {split!r}, received "
            f"{type(error).__name__}; splits there: {known}"
        ) from None
    # Before the columns: an empty split has no file, and so no column either.
    if not table.num_rows:
        raise InputError(
            f"{where}: {data}: expected items in split {split!r}, received an empty one"
        )
    _check_columns(table, columns, f"{where}: {folder}")
    return table


def _check_columns(table: pa.Table, columns: Mapping[str, str | None], where: str) -> None:
    """Refuse columns that are missing or hold values of another type than their role needs."""
    import pyarrow as pa

    missing = sorted(
        column for column in columns.values() if column and column not in table.column_names
    )
    if missing:
        raise InputError(
            f"{where}: expected a column {missing[0]!r}, received only {sorted(table.column_names)}"
        )
    for role in sorted(set(TEXTS) & set(columns)):
        if columns[role] is not None:
            _check_text(table, role, str(columns[role]), where)
    for column in _inputs({role: column for role, column in columns.items() if role not in TEXTS}):
        kind = table.schema.field(column).type
        if not (pa.types.is_integer(_leaf(kind)) or pa.types.is_floating(_leaf(kind))):
            raise InputError(
                f"{where}: expected arrays of numbers in column {column!r}, received {kind}"
            )
    label = columns.get("label")
    if label is not None and not pa.types.is_integer(table.schema.field(label).type):
        received = table.schema.field(label).type
        raise InputError(
            f"{where}: expected class numbers in column {label!r}, received {received}"
        )
    mask = columns.get("mask")
    if mask is not None and not pa.types.is_integer(_leaf(table.schema.field(mask).type)):
        received = table.schema.field(mask).type
        raise InputError(
            f"{where}: expected arrays of class numbers in column {mask!r}, received {received}"
        )


def _check_text(table: pa.Table, role: str, column: str, where: str) -> None:
    """Refuse a column that holds no texts, or, unless it is the target, lacks some."""
    import pyarrow as pa

    kind = table.schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{where}: expected texts in column {column!r}, received {kind}")
    if role != "target" and table.column(column).null_count:
        raise InputError(
            f"{where}: expected a text for every item in column {column!r}, received none for some"
        )


def _inputs(columns: Mapping[str, str | None]) -> list[str]:
    """The columns that a model reads."""
    return [
        column
        for role, column in columns.items()
        if role not in ("label", "domain", "id") and column is not None
    ]


def _ids(table: pa.Table, columns: Mapping[str, str | None]) -> set[str]:
    """Identities of all items: their ids, or hashes of their inputs."""
    if columns["id"] is not None:
        return {str(value) for value in table.column(columns["id"]).to_pylist()}
    first = table.column(_inputs(columns)[0])
    if set(TEXTS) & set(columns):
        return {text_identity(text) for text in first.to_pylist()}
    return {
        hashlib.sha256(row.tobytes()).hexdigest()[:16]
        for chunk in first.chunks
        for row in _rows(chunk)
    }


def text_identity(text: str) -> str:
    """Identity of an item without an id: a hash of its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _leaf(kind: pa.DataType) -> pa.DataType:
    """Type of the elements of arrays of any depth."""
    import pyarrow as pa

    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
            kind = kind.value_type
        else:
            return kind


def _rows(array: pa.Array) -> Iterator[npt.NDArray[np.float64]]:
    """Yield the numbers of each row, flat, whatever their nesting and type.

    They are read from the buffers, because images are large.
    """
    import pyarrow as pa

    bounds: npt.NDArray[Any] = np.arange(len(array) + 1)
    while True:
        if isinstance(array, pa.ExtensionArray):  # so `datasets` stores arrays of two axes or more
            array = array.storage
        elif isinstance(array, pa.FixedSizeListArray):
            bounds = bounds * array.type.list_size
            array = array.values
        elif isinstance(array, pa.ListArray | pa.LargeListArray):
            bounds = np.from_dlpack(array.offsets)[bounds]
            array = array.values
        else:
            break
    # Not `to_numpy`, which imports pandas.
    numbers = np.from_dlpack(
        array if not array.null_count else array.cast("float64").fill_null(float("nan"))
    )
    for start, stop in pairwise(bounds):
        yield numbers[start:stop].astype(np.float64)


def _domains(folder: Path, table: pa.Table, column: str | None) -> set[str]:
    """Names of the domains of a split.

    A column of class numbers has its names in the description of the data.
    """
    if column is None:
        return set()
    info = folder / "dataset_info.json"
    feature = (
        json.loads(info.read_text()).get("features", {}).get(column, {}) if info.is_file() else {}
    )
    values = table.column(column).unique().to_pylist()
    return {
        feature["names"][value] if feature.get("_type") == "ClassLabel" else str(value)
        for value in values
    }
