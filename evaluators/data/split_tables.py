"""The tables of all splits of files: read, checked, with class numbers, and divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.base import SPLITS
from mergesearch.evaluators.data.columns import (
    LISTS,
    MEDIA,
    PICTURES,
    RECORDINGS,
    TEXTS,
    Columns,
    check_columns,
    check_there,
    inputs,
    is_text,
)
from mergesearch.evaluators.data.division import divide
from mergesearch.evaluators.data.identities import identities
from mergesearch.evaluators.data.item_files import ItemFiles
from mergesearch.evaluators.data.labels import class_numbers, path_classes
from mergesearch.evaluators.data.layouts import AUDIO, CLASS, IMAGE, RawTable, read_layout
from mergesearch.evaluators.data.pictures import picture_array
from mergesearch.evaluators.data.recordings import recording_array
from mergesearch.merging import InputError
from mergesearch.merging.foreign.shown import shown_names

if TYPE_CHECKING:
    import pyarrow as pa

#: Classes above which a division does not keep the shares of every one.
MOST_CLASSES = 200


def read_splits(files: ItemFiles, columns: Columns, where: str) -> dict[str, pa.Table]:
    """Split -> table of the columns in question, over all domains.

    Args:
        files: Where the items are.
        columns: Role -> column.
        where: Key of the study file, for messages.

    Raises:
        InputError: In one line.
    """
    import pyarrow as pa

    parts: dict[str, list[pa.Table]] = {}
    for domain, path in files.paths.items():
        for split, table in _of_path(files, domain, path, columns, where).items():
            parts.setdefault(split, []).append(table)
    try:
        return {
            split: pa.concat_tables(tables, promote_options="permissive")
            for split, tables in parts.items()
        }
    except pa.ArrowException as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: {files}: expected columns of the same types in every file, received: {text}"
        ) from None


def classes_of(files: ItemFiles, column: str, where: str) -> dict[str, list[str]]:
    """Domain -> names of its classes in the order of their numbers; "" where one path has all.

    Raises:
        InputError: If nothing names the classes of a domain.
    """
    found = {}
    for domain, path in files.paths.items():
        raws = [_named(raw, {"label": column}) for raw in read_layout(path, (), where).values()]
        for raw in raws:
            check_there(raw.table.column_names, {"label": column}, f"{where}: {path}")
        names = path_classes(files, domain, raws, column)
        if not names:
            of = f" of {domain!r}" if domain else ""
            raise InputError(
                f"{where}: expected names of the classes{of}, found only numbers; list them in "
                "data.classes"
            )
        found[domain] = names
    return found


def _of_path(
    files: ItemFiles, domain: str, path: Path, columns: Columns, where: str
) -> dict[str, pa.Table]:
    """Split -> table of one file or folder."""
    shared = {role: None if role == "domain" and domain else c for role, c in columns.items()}
    wanted = shared | {"split": files.split}
    texts = {c for role, c in wanted.items() if c is not None and _stays_text(role)}
    layout = read_layout(path, texts, where)
    if files.split is not None and None not in layout:
        raise InputError(
            f"{where}.split: expected no column of splits, because {path} has the splits "
            f"{shown_names(str(name) for name in layout)}; leave it out"
        )
    tables = {}
    raws = {split: _named(raw, wanted) for split, raw in layout.items()}
    for raw in raws.values():
        check_there(raw.table.column_names, wanted, f"{where}: {path}")
    names = {
        column: path_classes(files, domain, list(raws.values()), column)
        for role in ("label", "tags")
        if (column := wanted.get(role)) is not None
    }
    for split, raw in raws.items():
        tables[split] = _whole(raw, names, wanted, f"{where}: {path}")
        check_columns(tables[split], shared, f"{where}: {path}")
    if None not in tables:
        divided = {str(split): table for split, table in tables.items()}
    elif files.split is not None:
        divided = _by_column(tables[None], files.split)
    else:
        divided = _by_content(tables[None], files, shared, f"{where}: {path}")
    return {
        split: _with_domain(table, columns.get("domain"), domain)
        for split, table in divided.items()
    }


def _stays_text(role: str) -> bool:
    return role in (*TEXTS, *LISTS, "domain", "id", "split")


def _named(raw: RawTable, columns: Columns) -> RawTable:
    """A folder of classes with the names that the study has for its columns."""
    if not raw.media:
        return raw
    roles = {IMAGE: PICTURES, AUDIO: RECORDINGS}[raw.media]
    files = next((c for role, c in columns.items() if role in roles and c), raw.media)
    label = columns.get("label") or CLASS
    return replace(raw, table=raw.table.rename_columns([files, label]))


def _whole(
    raw: RawTable, names: Mapping[str, list[str] | None], columns: Columns, where: str
) -> pa.Table:
    """The columns in question, with class numbers, pictures and recordings in their common form."""
    import pyarrow as pa

    made: dict[str, Any] = {}
    for role, column in columns.items():
        if column is None or column in made:
            continue
        values = raw.table.column(column)
        kind = values.type
        if role in ("label", "tags"):
            values = class_numbers(values, names[column], column, where)
        elif role == "domain" and column in raw.names:
            values = pa.array([raw.names[column][number] for number in values.to_pylist()])
        elif role in MEDIA and (
            is_text(kind) or pa.types.is_struct(kind) or pa.types.is_binary(kind)
        ):
            made_of = picture_array if role in PICTURES else recording_array
            values = made_of(values.to_pylist(), raw.folder, f"{where}: column {column!r}")
        elif _stays_text(role) and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            values = values.cast(pa.string())
        made[column] = values
    return pa.table(made)


def _by_column(table: pa.Table, column: str) -> dict[str, pa.Table]:
    """Split -> rows whose column has its name."""
    import pyarrow as pa
    from pyarrow import compute

    names = [name for name in table.column(column).unique().to_pylist() if name is not None]
    return {
        name: table.filter(compute.equal(table.column(column), pa.scalar(name))) for name in names
    }


def _by_content(
    table: pa.Table, files: ItemFiles, columns: Columns, where: str
) -> dict[str, pa.Table]:
    """The three splits of a table that has none."""
    import pyarrow as pa

    contents = _contents(table, columns)
    parts = divide(contents, _strata(table, columns), files.shares, files.seed)
    found: dict[str, pa.Table] = {
        split: table.filter(pa.array((parts == index).tolist(), pa.bool_()))
        for index, split in enumerate(SPLITS)
    }
    empty = next((split for split, part in found.items() if not part.num_rows), None)
    if empty is not None:
        raise InputError(
            f"{where}: expected items for three splits, received {len(set(contents))} different "
            f"ones, of which {empty} gets none; add items, or change data.divide"
        )
    return found


def _contents(table: pa.Table, columns: Columns) -> list[str]:
    """What items are the same by; texts that differ in case or spaces alone are near enough."""
    role, column = next(iter(inputs(columns).items()))
    if role in TEXTS:
        return [" ".join(text.split()).casefold() for text in table.column(column).to_pylist()]
    return identities(table, {**columns, "id": None})


def _strata(table: pa.Table, columns: Columns) -> list[tuple[Any, ...]]:
    """Class and domain of every item; a column with very many classes does not count."""
    import pyarrow as pa

    kept = []
    for role in ("label", "domain"):
        column = columns.get(role)
        if column is None or pa.types.is_floating(table.schema.field(column).type):
            continue
        values = table.column(column).to_pylist()
        if len(set(values)) <= MOST_CLASSES:
            kept.append(values)
    return list(zip(*kept, strict=True)) if kept else [()] * table.num_rows


def _with_domain(table: pa.Table, column: str | None, domain: str) -> pa.Table:
    """The table with a column of its domain, where each domain has a file of its own."""
    import pyarrow as pa

    if not domain:
        return table
    assert column is not None
    return table.append_column(column, pa.array([domain] * table.num_rows, pa.string()))
