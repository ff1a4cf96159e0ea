"""Tables from CSV, TSV, JSON lines, Parquet and Arrow files, read without pandas."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergesearch.merging import InputError
from mergesearch.merging.foreign.datasets_folder import class_names, read_arrow, read_split
from mergesearch.merging.foreign.library import reason
from mergesearch.merging.foreign.nested import check_nesting
from mergesearch.merging.foreign.reading import read_bytes
from mergesearch.merging.foreign.shown import path_shown, shown

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "READERS",
    "UNREADABLE",
    "class_names",
    "read_datasets_table",
    "read_table_file",
]

#: Why a file cannot be read, of its contents and of the machine.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, InputError)
#: The largest file of texts that is read whole, in bytes.
TABLE_LIMIT = 1 << 34


def read_table_file(path: Path, texts: Collection[str], where: str) -> pa.Table:
    """Read a table of at least one row.

    Args:
        path: A file whose suffix is a key of :data:`READERS`.
        texts: Columns that stay texts, even where they look like numbers.
        where: Key of the study file, for messages.

    Raises:
        InputError: If it cannot be read, is not UTF-8, or is empty.
    """
    import pyarrow as pa

    suffix = path.suffix.lower()
    named = f"{where}: {path_shown(path)}"
    try:
        table = READERS[suffix](path, texts)
        table.validate(full=True)  # what reads a damaged table may leave its memory
        check_columns_of(table, named)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{named}: expected UTF-8, received byte 0x{error.object[error.start]:02x} at "
            f"position {error.start}; convert the file, for example with iconv"
        ) from None
    except (*UNREADABLE, pa.ArrowException) as error:
        raise InputError(
            f"{named}: expected a readable {suffix} file, received {reason(error)}"
        ) from None
    if not table.num_rows:
        raise InputError(f"{named}: expected items, received an empty file")
    return table


def check_columns_of(table: pa.Table, where: str) -> None:
    """Refuse columns that go by one name: which of them is meant is anybody's guess.

    Raises:
        InputError: With the name.
    """
    names = table.column_names
    double = next((name for name, count in Counter(names).items() if count > 1), None)
    if double is not None:
        raise InputError(
            f"{where}: expected columns of different names, received {shown(double)} twice"
        )


def read_datasets_table(folder: Path) -> pa.Table:
    """Read the Arrow files of one split that ``save_to_disk`` wrote.

    Raises:
        InputError: If they or their list are damaged.
    """
    table = read_split(folder)
    check_columns_of(table, path_shown(folder))
    return table


def _delimited(delimiter: str) -> Callable[[Path, Collection[str]], pa.Table]:
    def read(path: Path, texts: Collection[str]) -> pa.Table:
        import pyarrow as pa
        from pyarrow import csv

        content = _decoded(path)
        if not content.strip():
            return pa.table({})
        return csv.read_csv(
            io.BytesIO(content),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(texts, pa.string()), strings_can_be_null=False
            ),
        )

    return read


def _json_lines(path: Path, texts: Collection[str]) -> pa.Table:
    import pyarrow as pa

    # Not splitlines: texts in JSON may hold U+2028, which is no end of a line there.
    lines = _decoded(path).decode().split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    return _as_table(rows) if rows else pa.table({})


def _json(path: Path, texts: Collection[str]) -> pa.Table:
    rows = json.loads(_decoded(path))
    if not isinstance(rows, list):
        raise ValueError(f"expected a list of objects, found {type(rows).__name__}")
    return _as_table(rows)


def _as_table(rows: list[object]) -> pa.Table:
    import pyarrow as pa

    odd = next((index for index, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if odd is not None:
        raise ValueError(f"expected an object for every item, found another value for item {odd}")
    check_nesting(rows, "the items", surrogates=True)
    return pa.Table.from_pylist(rows)


def _parquet(path: Path, texts: Collection[str]) -> pa.Table:
    from pyarrow import parquet

    return parquet.read_table(path)


def _arrow(path: Path, texts: Collection[str]) -> pa.Table:

    return read_arrow(path)


def _decoded(path: Path) -> bytes:
    """The bytes of a file that is UTF-8, without the mark that some programs write first."""
    content = read_bytes(path, TABLE_LIMIT)
    content.decode()
    return content.removeprefix(b"\xef\xbb\xbf")


#: Suffix -> what reads such a file.
READERS: Mapping[str, Callable[[Path, Collection[str]], pa.Table]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
