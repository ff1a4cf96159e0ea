"""Plain columns of a ``save_to_disk`` folder, read without the package that wrote it.

Importing ``datasets`` takes as long as importing half of torch, and numbers, texts and arrays of
one shape need none of it. What it returns for other columns (media, missing values, a saved format
or selection of rows) is its own to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging import InputError
from mergesearch.merging.foreign.datasets_folder import STATE, features_of, read_split
from mergesearch.merging.foreign.json_text import read_json

if TYPE_CHECKING:
    import pyarrow as pa

    #: Makes the values of a column; None where it cannot.
    _Reader = Callable[[pa.Array], Any]

#: Keys of ``state.json`` by which a folder shows other rows, or other values, than its files hold.
_VIEWS = ("_format_type", "_format_columns", "_indices_data_files", "_output_all_columns")
#: Kinds of a feature whose rows are arrays of one shape -> the number of axes.
_ARRAYS = {"Array2D": 2, "Array3D": 3, "Array4D": 4, "Array5D": 5}
#: Kinds of a feature whose rows are lists of any length.
_LISTS = ("List", "LargeList")


def plain_columns(
    folder: Path, arrays: Collection[str], lists: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The values of columns, as ``datasets`` gives them.

    Args:
        folder: Of one split.
        arrays: Columns that are wanted in the numpy format.
        lists: Columns that are wanted as lists of Python values.

    Returns:
        Column -> values, of the arrays and of the lists; None if ``datasets`` must be asked.
    """
    try:
        features = features_of(folder)
        if any(read_json(folder / STATE).get(key) for key in _VIEWS):
            return None
        table = read_split(folder, full=False)  # `check` has looked at every value
    except (InputError, AttributeError):
        return None
    read_arrays = _read(table, {each: _array_reader(features.get(each)) for each in arrays})
    read_lists = _read(table, {each: _list_reader(features.get(each)) for each in lists})
    return None if read_arrays is None or read_lists is None else (read_arrays, read_lists)


def _read(table: pa.Table, readers: Mapping[str, _Reader | None]) -> dict[str, Any] | None:
    """Column -> values; None if one has no reader, or its reader gives it up."""
    found: dict[str, Any] = {}
    for column, read in readers.items():
        array = None if read is None else _joined(table, column)
        values = None if read is None or array is None else read(array)
        if values is None:
            return None
        found[column] = values
    return found


def _joined(table: pa.Table, column: str) -> pa.Array | None:
    """One array of a column, without the type that ``datasets`` gives arrays if it is imported."""
    import pyarrow as pa

    try:
        chunks = table.column(column).chunks
        array = pa.concat_arrays([getattr(chunk, "storage", chunk) for chunk in chunks])
    except (KeyError, pa.ArrowException):  # no such column, no row, or too many for one array
        return None
    return array


def _array_reader(feature: Any) -> _Reader | None:
    """What makes numpy values of a column; None for features that are not plain."""
    if _is_number(feature):
        return _numbers
    if _is_text(feature):
        return _texts
    kind = feature.get("_type") if isinstance(feature, Mapping) else None
    if kind in _ARRAYS:
        shape = feature.get("shape")
        if isinstance(shape, list) and len(shape) == _ARRAYS[kind] and all(shape):
            return lambda array: _shaped(array, shape)
    return _ragged if _is_list(feature) and _is_number(feature.get("feature")) else None


def _list_reader(feature: Any) -> _Reader | None:
    """What makes Python values of a column; None for features that are not plain."""
    inner = feature.get("feature") if _is_list(feature) else feature
    return _values if _is_text(inner) or _is_number(inner) else None


def _is_number(feature: Any) -> bool:
    """Whether a feature is a class number, a whole number or a float."""
    if not isinstance(feature, Mapping):
        return False
    dtype = str(feature.get("dtype"))
    numeric = dtype.startswith(("int", "uint", "float"))
    return feature.get("_type") == "ClassLabel" or (feature.get("_type") == "Value" and numeric)


def _is_list(feature: Any) -> bool:
    """Whether the rows of a feature are lists of any length."""
    if not isinstance(feature, Mapping) or feature.get("length", -1) != -1:
        return False
    return feature.get("_type") in _LISTS


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Mapping) and (feature.get("_type"), feature.get("dtype")) == (
        "Value",
        "string",
    )


def _values(array: pa.Array) -> list[Any]:
    return list(array.to_pylist())


def _numbers(array: pa.Array) -> npt.NDArray[Any] | None:
    """Numbers ``(items,)`` in the width that the numpy format has: int64 or float32."""
    if array.null_count:
        return None
    numbers = np.from_dlpack(array)  # not to_numpy(), which imports pandas
    return np.array(numbers, dtype=_width(numbers.dtype))


def _width(dtype: np.dtype[Any]) -> type[np.int64] | type[np.float32]:
    return np.int64 if np.issubdtype(dtype, np.integer) else np.float32


def _texts(array: pa.Array) -> npt.NDArray[Any] | None:
    """Texts ``(items,)``."""
    return None if array.null_count else np.array(array.to_pylist())


def _lengths(array: pa.Array) -> npt.NDArray[np.int64]:
    """Lengths of the lists of a column ``(items,)``; 0 for all where one is missing."""
    lengths = np.diff(_offsets(array))
    return np.zeros_like(lengths) if array.null_count else lengths


def _offsets(array: pa.Array) -> npt.NDArray[np.int64]:
    """Where the lists of a column begin among their elements, and where the last one ends."""
    return np.asarray(np.from_dlpack(array.offsets), np.int64)


def _elements(array: pa.Array) -> pa.Array:
    """The elements of all lists of a column, one after the other."""
    # Neither this nor lengths by the array's own methods, which import pyarrow.compute.
    first, *_, last = _offsets(array)
    return array.values.slice(first, last - first)


def _shaped(array: pa.Array, shape: Sequence[int]) -> npt.NDArray[Any] | None:
    """Arrays of one shape: ``(items, *shape)``."""
    items = len(array)
    for size in shape:
        if not (_lengths(array) == size).all():
            return None
        array = _elements(array)
    numbers = _numbers(array)
    return None if numbers is None else numbers.reshape(items, *shape)


def _ragged(array: pa.Array) -> npt.NDArray[Any] | None:
    """Lists of numbers: ``(items, length)`` if all are equally long, else objects ``(items,)``."""
    lengths = _lengths(array)
    numbers = _numbers(_elements(array))
    if numbers is None or not lengths.all():  # an empty list has no type there
        return None
    if (lengths == lengths[0]).all():
        return numbers.reshape(len(lengths), -1)
    rows = np.empty(len(lengths), dtype=object)
    rows[:] = np.split(numbers, np.cumsum(lengths)[:-1])
    return rows
