"""Roles of columns, and what their values must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergesearch.merging import InputError
from mergesearch.merging.foreign.shown import shown_names

if TYPE_CHECKING:
    import pyarrow as pa

#: Role -> column; roles that an evaluator can do without may have None.
Columns = Mapping[str, str | None]

#: From so many rows on, importing Arrow's functions takes less time than doing without them.
MANY_ROWS = 1_000_000
#: Roles of columns that hold a text.
TEXTS = ("prompt", "target", "text", "pair")
#: Roles of columns that hold several texts.
LISTS = ("words", "answers")
#: Roles of columns that may hold pictures.
PICTURES = ("image", "input", "pixel_values", "picture")
#: Roles of columns that may hold recordings.
RECORDINGS = ("input_values", "input_features")
#: Roles of columns that may hold the bytes or paths of files.
MEDIA = (*PICTURES, *RECORDINGS)
#: What a row of such a column has (:mod:`mergesearch.evaluators.data.media`).
MEDIA_FIELDS = frozenset({"bytes", "path", "size"})
#: Roles of columns that no model reads.
ANSWERS = ("label", "domain", "id", "number", "tags", "answers", "target")
#: Texts of which an item may lack one.
MAY_LACK = ("target",)


def check_columns(table: pa.Table, columns: Columns, where: str) -> None:
    """Refuse columns that are missing or hold values of another type than their role needs.

    Raises:
        InputError: In one line.
    """
    import pyarrow as pa

    check_there(table.column_names, columns, where)
    for role, column in columns.items():
        if column is not None and role in TEXTS:
            _check_text(table, role, column, where)
        if column is not None and role in LISTS:
            _check_list(table, column, where)
    for role in columns:
        _check_numbers(table, role, columns, where)
    label = columns.get("label")
    if label is not None and not pa.types.is_integer(table.schema.field(label).type):
        received = table.schema.field(label).type
        raise InputError(
            f"{where}: expected class numbers in column {label!r}, received {received}"
        )
    for role, what in (("mask", "arrays of class numbers"), ("tags", "lists of class numbers")):
        column = columns.get(role)
        if column is not None and not pa.types.is_integer(leaf(table.schema.field(column).type)):
            received = table.schema.field(column).type
            raise InputError(f"{where}: expected {what} in column {column!r}, received {received}")


def check_there(names: list[str], columns: Columns, where: str) -> None:
    """Refuse columns that are missing.

    Raises:
        InputError: In one line.
    """
    missing = sorted(column for column in columns.values() if column and column not in names)
    if missing:
        raise InputError(
            f"{where}: expected a column {missing[0]!r}, received only {shown_names(names)}"
        )


def distinct(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column, each once, in the order of their first rows."""
    if len(column) > MANY_ROWS:
        return list(column.unique().to_pylist())
    return list(dict.fromkeys(column.to_pylist()))


def inputs(columns: Columns) -> dict[str, str]:
    """Role -> column of what a model reads."""
    return {
        role: column
        for role, column in columns.items()
        if role not in ANSWERS and column is not None
    }


def holds_media(kind: pa.DataType) -> bool:
    """Whether a column of this type holds pictures or recordings in their common form."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return False
    return pa.types.is_struct(kind) and {field.name for field in kind} == MEDIA_FIELDS


def leaf(kind: pa.DataType) -> pa.DataType:
    """Type of the elements of arrays of any depth."""
    import pyarrow as pa

    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
            kind = kind.value_type
        else:
            return kind


def _check_numbers(table: pa.Table, role: str, columns: Columns, where: str) -> None:
    """Refuse what a model reads as arrays and a target that is a number, unless it is numbers."""
    import pyarrow as pa

    column = columns[role]
    if column is None or (role not in inputs(columns) and role != "number"):
        return
    kind = table.schema.field(column).type
    if role in (*TEXTS, *LISTS) or (role in MEDIA and holds_media(kind)):
        return
    if not (pa.types.is_integer(leaf(kind)) or pa.types.is_floating(leaf(kind))):
        what = "numbers" if role == "number" else "arrays of numbers"
        raise InputError(f"{where}: expected {what} in column {column!r}, received {kind}")


def _check_text(table: pa.Table, role: str, column: str, where: str) -> None:
    """Refuse a column that holds no texts, or, unless it is the target, lacks some."""
    kind = table.schema.field(column).type
    if not is_text(kind):
        raise InputError(f"{where}: expected texts in column {column!r}, received {kind}")
    if role not in MAY_LACK and table.column(column).null_count:
        raise InputError(
            f"{where}: expected a text for every item in column {column!r}, received none for some"
        )


def _check_list(table: pa.Table, column: str, where: str) -> None:
    kind = table.schema.field(column).type
    if not is_text(leaf(kind)) or is_text(kind) or table.column(column).null_count:
        raise InputError(f"{where}: expected lists of texts in column {column!r}, received {kind}")


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are texts."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
