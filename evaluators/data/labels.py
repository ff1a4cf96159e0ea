"""Class numbers from the names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.data.columns import is_text, leaf
from mergesearch.evaluators.data.item_files import ItemFiles
from mergesearch.evaluators.data.layouts import RawTable
from mergesearch.evaluators.data.pretrained import checkpoint_config
from mergesearch.merging import InputError
from mergesearch.merging.foreign.shown import cut, shown

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
            f"names such as {shown(min(_flat(rows)))} in the order of the model's numbers in "
            "data.classes"
        )
    numbers = {name: number for number, name in enumerate(names)}
    odd = sorted(_flat(rows) - set(numbers))
    if odd:
        raise InputError(
            f"{where}: column {column!r}: expected classes among {_shown(names)}, received "
            f"{shown(odd[0])}; mend it, or list all classes in data.classes"
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


def largest_class(table: pa.Table, column: str, domain: str | None) -> dict[str, int]:
    """Domain as the table has it -> the largest class number; "" without domains.

    Args:
        table: Its classes are numbers already.
        column: Of classes, or of lists of them.
        domain: Column of domains, if there is one.
    """
    from pyarrow import compute

    values = table.column(column)
    if domain is None:
        found = {"": _largest(values)}
    else:
        names = table.column(domain)
        # The scalars are the table's own: making one of a text would import pandas.
        found = {
            str(name.as_py()): _largest(values.filter(compute.equal(names, name)))
            for name in names.unique()
            if name.is_valid
        }
    return {name: number for name, number in found.items() if number is not None}


def _largest(values: pa.ChunkedArray) -> int | None:
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_nested(values.type):
        values = compute.list_flatten(values)
    if not pa.types.is_integer(values.type):
        return None
    number: int | None = compute.max(values).as_py()
    return number


def check_tagged(table: pa.Table, words: str, tags: str, where: str) -> None:
    """Refuse lists of tags that are longer or shorter than those of their words.

    Raises:
        InputError: In one line.
    """
    from pyarrow import compute

    counts = compute.list_value_length(table.column(words))
    given = compute.list_value_length(table.column(tags))
    odd = compute.index(compute.not_equal(counts, given), True).as_py()
    if odd >= 0:
        raise InputError(
            f"{where}: item {odd}: expected a tag for every word, received {counts[odd]} words and "
            f"{given[odd]} tags; mend the item"
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
        _listed(names) if len(names) <= 12 else f"{_listed(names[:12])} and {len(names) - 12} more"
    )


def _listed(names: Sequence[str]) -> str:
    return cut(f"[{', '.join(shown(name, 40) for name in names)}]", 200)
