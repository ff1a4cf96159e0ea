"""Tables from CSV, TSV, JSON lines, Parquet and Arrow files, read without pandas."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergesearch.merging import InputError

if TYPE_CHECKING:
    import pyarrow as pa

#: Why a file cannot be read, of its contents and of the machine.
UNREADABLE = (OSError, ValueError, KeyError, TypeError)


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

    try:
        table = READERS[path.suffix.lower()](path, texts)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: {path}: expected UTF-8, received byte 0x{error.object[error.start]:02x} at "
            f"position {error.start}; convert the file, for example with iconv"
        ) from None
    except (*UNREADABLE, pa.ArrowException) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: {path}: expected a readable {path.suffix} file, received "
            f"{type(error).__name__}: {text}"
        ) from None
    if not table.num_rows:
        raise InputError(f"{where}: {path}: expected items, received an empty file")
    return table


def read_datasets_table(folder: Path) -> pa.Table:
    """Read the Arrow files of one split that ``save_to_disk`` wrote."""
    import pyarrow as pa

    files = json.loads((folder / "state.json").read_text())["_data_files"]
    tables = [pa.ipc.open_stream(folder / file["filename"]).read_all() for file in files]
    return pa.concat_tables(tables) if tables else pa.table({})


def class_names(folder: Path) -> dict[str, list[str]]:
    """Column -> names of its classes, from the description of a `datasets` folder."""
    info = folder / "dataset_info.json"
    features = json.loads(info.read_text()).get("features") or {} if info.is_file() else {}
    found = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            found[column] = list(inner["names"])
    return found


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

    rows = [json.loads(line) for line in _decoded(path).decode().splitlines() if line.strip()]
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
    return pa.Table.from_pylist(rows)


def _parquet(path: Path, texts: Collection[str]) -> pa.Table:
    from pyarrow import parquet

    return parquet.read_table(path)


def _arrow(path: Path, texts: Collection[str]) -> pa.Table:
    import pyarrow as pa

    return pa.ipc.open_stream(path).read_all()


def _decoded(path: Path) -> bytes:
    """The bytes of a file that is UTF-8, without the mark that some programs write first."""
    content = path.read_bytes()
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
