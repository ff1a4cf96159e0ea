"""Splits that ``save_to_disk`` wrote, read as they are on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.data.columns import (
    LISTS,
    MEDIA,
    TEXTS,
    Columns,
    check_columns,
    distinct,
    inputs,
)
from mergesearch.evaluators.data.plain_columns import plain_columns
from mergesearch.evaluators.data.table_files import class_names, read_datasets_table
from mergesearch.merging import InputError
from mergesearch.merging.extensions.heavy_imports import fast_imports
from mergesearch.merging.foreign.datasets_folder import data_files, features_of, read_arrow
from mergesearch.merging.foreign.file_kinds import kind_of
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.paths import is_file
from mergesearch.merging.foreign.shown import cut, path_shown, shown, shown_names

if TYPE_CHECKING:
    import pyarrow as pa


def count_items(folder: Path) -> int:
    """Number of items of a split, from its files' headers."""
    return sum(read_arrow(file, full=False).num_rows for file in data_files(folder))


def must_convert(folder: Path, columns: Columns) -> bool:
    """Whether a column of a split must be converted: media, and classes by their names."""
    media = {column for role, column in inputs(columns).items() if role in MEDIA}
    labels = {columns.get("label"), columns.get("tags")} - {None}
    if not media | labels:
        return False
    try:
        found = features_of(folder)
    except InputError:
        return False
    return any(_kind(found.get(column or "")) in ("Image", "Audio") for column in media) or any(
        _kind(found.get(column or "")) == "string" for column in labels
    )


def _kind(feature: Any) -> str:
    """Type of a feature or of the elements of a list, or of a plain value."""
    while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    if not isinstance(feature, dict):
        return ""
    return str(feature.get("dtype") if feature.get("_type") == "Value" else feature.get("_type"))


def load_datasets(folder: Path, columns: Columns) -> dict[str, Any]:
    """Load columns of a split that ``save_to_disk`` wrote."""
    wanted = {role: column for role, column in columns.items() if column is not None}
    # An array of texts would take the length of the longest one for each of them.
    lists = {role: column for role, column in wanted.items() if role in (*TEXTS, *LISTS, "tags")}
    arrays = {role: column for role, column in wanted.items() if role not in lists}
    plain = plain_columns(folder, {*arrays.values()}, {*lists.values()})
    if plain is None:
        return _by_datasets(folder, arrays, lists)
    loaded = {role: plain[0][column] for role, column in arrays.items()}
    loaded |= {role: plain[1][column] for role, column in lists.items()}
    names = class_names(folder).get(arrays.get("domain", ""))
    if names is not None:
        loaded["domain"] = [names[number] for number in loaded["domain"].tolist()]
    return loaded


def _by_datasets(
    folder: Path, arrays: Mapping[str, str], lists: Mapping[str, str]
) -> dict[str, Any]:
    """The same for columns of any kind: some as arrays, some as lists; by role."""
    with fast_imports():
        from datasets import ClassLabel, load_from_disk

    with library_errors(path_shown(folder), "a folder of save_to_disk"):
        dataset = load_from_disk(str(folder))
    values = dataset.with_format("numpy", columns=sorted(set(arrays.values())))[:] if arrays else {}
    loaded = {role: values[column] for role, column in arrays.items()}
    loaded |= {role: list(dataset[column]) for role, column in lists.items()}
    domain = arrays.get("domain")
    if domain is not None and isinstance(dataset.features[domain], ClassLabel):
        loaded["domain"] = dataset.features[domain].int2str(loaded["domain"].tolist())
    return loaded


def datasets_table(data: Path, split: str, columns: Columns, where: str) -> pa.Table:
    """Read a split as it is on disk; it has the columns in question and at least one item."""
    folder = data / split
    if not data.is_dir():
        found = f"{kind_of(data)}, {data}" if data.exists() else f"no {data}"
        raise InputError(
            f"{where}: expected a folder written by save_to_disk, or a file of items, found {found}"
        )
    try:
        table = read_datasets_table(folder)
        names = class_names(folder)
    except InputError as error:
        known = [path.name for path in data.iterdir() if is_file(path / "state.json")]
        raise InputError(
            f"{where}: {path_shown(data)}: expected a readable split {shown(split)}, received: "
            f"{cut(str(error), 200)}; splits there: {shown_names(known)}"
        ) from None
    # Before the columns: an empty split has no file, and so no column either.
    if not table.num_rows:
        raise InputError(
            f"{where}: {data}: expected items in split {split!r}, received an empty one"
        )
    check_columns(table, columns, f"{where}: {folder}")
    domain = columns.get("domain")
    if domain in names:
        _check_numbers(table.column(domain), names[domain], f"{where}: {path_shown(folder)}")
    return table


def _check_numbers(domains: pa.ChunkedArray, names: Sequence[str], where: str) -> None:
    """Refuse numbers of domains that have no name."""
    for number in distinct(domains):
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise InputError(
                f"{where}: expected numbers of domains below {len(names)}, received {shown(number)}"
            )
