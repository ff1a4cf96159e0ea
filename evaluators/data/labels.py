"""Class numbers from the names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.data.columns import is_text, leaf
from mergesearch.evaluators.data.item_files import ItemFiles
from mergesearch.evaluators.data.layouts import RawTable
from mergesearch.evaluators.data.pretrained import checkpoint_config
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import pyarrow as pa


def path_classes(
    files: ItemFiles, domain: str, raws: Sequence[RawTable], column: str
) -> list[str] | None:
    """Names of the classes of all tables of a path, or None where nothing says so.

    The study comes first, then the files. Where classes are names, the configuration of the
    checkpoint comes next and, if the study allows it, the names that occur, in their order.
    Numbers are not held against the checkpoint, because experts may have heads of their own.
    """
    import pyarrow as pa

    given = files.classes or {}
    names = given.get(domain, given.get(""))
    if names is not None:
        return list(names)
    if any(column in raw.names for raw in raws):
        return next(raw.names[column] for raw in raws if column in raw.names)
    found: set[str] = set()
    for raw in raws:
        values = raw.table.column(column)
        if pa.types.is_dictionary(values.type) or is_text(leaf(values.type)):
            found |= _flat(values.to_pylist())
    if not found:
        return None
    return classes_of_checkpoint(files.checkpoint) or (sorted(found) if files.named else None)


def class_numbers(
    values: pa.ChunkedArray, names: list[str] | None, column: str, where: str
) -> pa.ChunkedArray:
    """A column of classes as numbers; lists of names become lists of numbers.

    Args:
        values: The column; numbers are only checked against the known classes.
        names: Names of the classes in the order of their numbers, or None.
        column: Its name.
        where: Key of the study file, for messages.

    Raises:
        InputError: If a class is unknown, or nothing says which number a name has.
    """
    import pyarrow as pa

    if values.null_count:
        raise InputError(
            f"{where}: column {column!r}: expected a class for every item, received none for some"
        )
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not is_text(leaf(values.type)):
        _check_numbers(values, names, column, where)
        return values
    rows = values.to_pylist()
    if names is None:
        raise InputError(
            f"{where}: expected class numbers in column {column!r}, received {values.type}; list "
            f"names such as {min(_flat(rows))!r} in the order of the model's numbers in "
            "data.classes"
        )
    numbers = {name: number for number, name in enumerate(names)}
    odd = sorted(_flat(rows) - set(numbers))
    if odd:
        raise InputError(
            f"{where}: column {column!r}: expected classes among {_shown(names)}, received "
            f"{odd[0]!r}; mend it, or list all classes in data.classes"
        )
    if is_text(values.type):
        return pa.chunked_array([pa.array([numbers[row] for row in rows], pa.int64())])
    lists = [[numbers[name] for name in row] for row in rows]
    return pa.chunked_array([pa.array(lists, pa.list_(pa.int64()))])


def _flat(rows: Sequence[Any]) -> set[str]:
    """All names in a column of names, or of lists of them."""
    found: set[str] = set()
    for row in rows:
        found |= {row} if isinstance(row, str) else set(row or ())
    return found


def _check_numbers(
    values: pa.ChunkedArray, names: list[str] | None, column: str, where: str
) -> None:
    """Refuse numbers beyond the known classes; those below 0 may mean that an item is ignored."""
    import pyarrow as pa
    from pyarrow import compute

    if names is None or not pa.types.is_integer(values.type):
        return
    largest = compute.max(values).as_py()
    if largest is not None and largest >= len(names):
        raise InputError(
            f"{where}: column {column!r}: expected class numbers below {len(names)}, for "
            f"{_shown(names)}, received {largest}"
        )


def classes_of_checkpoint(checkpoint: str | None) -> list[str] | None:
    """Names of the classes of a checkpoint, unless they are mere numbers."""
    config = {} if checkpoint is None else checkpoint_config(checkpoint, "data.processor")
    numbers = config.get("label2id") or {}
    ordered = sorted(numbers, key=lambda name: int(numbers[name]))
    plain = all(name == f"LABEL_{index}" for index, name in enumerate(ordered))
    whole = sorted(map(int, numbers.values())) == list(range(len(numbers)))
    return None if plain or not whole else ordered


def _shown(names: Sequence[str]) -> str:
    """The names, the first of them where there are many."""
    return (
        str(list(names)) if len(names) <= 12 else f"{list(names[:12])} and {len(names) - 12} more"
    )
