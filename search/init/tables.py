"""What lies at a path of data: columns, types and sizes, and which parts are for what."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergesearch.evaluators.data.columns import is_text, leaf
from mergesearch.evaluators.data.item_files import is_datasets_folder
from mergesearch.evaluators.data.layouts import AUDIO, IMAGE, SUFFIXES, RawTable, read_layout
from mergesearch.evaluators.data.table_files import READERS
from mergesearch.merging import InputError
from mergesearch.merging.foreign.paths import resolved

if TYPE_CHECKING:
    import pyarrow as pa

ColumnKind = Literal["text", "texts", "integer", "number", "numbers", "image", "audio", "other"]

#: Role of a split -> what its part of the data may be called.
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "search": ("search", "train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation", "holdout"),
}
#: Names of columns that may say which split an item belongs to.
SPLIT_COLUMNS = ("split", "part", "subset", "partition", "fold")
#: Names of files and folders that say nothing of what they hold.
GENERAL = ("data", "dataset", "items", "all", *(n for known in SPLIT_NAMES.values() for n in known))
#: Values of a column that are kept to compare with names of classes.
MOST_VALUES = 1000
#: Texts whose words are counted.
COUNTED = 200


@dataclass(frozen=True)
class Column:
    """A column of the data.

    Attributes:
        name: Its name.
        kind: What it holds; of lists, what these hold.
        distinct: Number of different values; 0 for arrays.
        values: The different values of texts and integers, where there are not very many.
        words: Words of a text in the mean of the first.
        longest: Words of the longest of these.
    """

    name: str
    kind: ColumnKind
    distinct: int = 0
    values: frozenset[Any] = frozenset()
    words: float = 0.0
    longest: int = 0

    def __str__(self) -> str:
        """Name and kind, for messages."""
        classes = f", {self.distinct} different" if self.kind in ("text", "integer") else ""
        return f"{self.name} ({self.kind}{classes})"


@dataclass(frozen=True, eq=False)
class DataFile:
    """Items at a path.

    Attributes:
        name: What they are called.
        given: The path as the user gave it.
        path: The part of it that a study reads.
        columns: By name.
        rows: Items in all.
        named: Column -> names of its classes, where the file says so.
        splits: Role -> name of the split, where the data name splits; empty where they are divided.
        split_column: Column that names the split, if there is one.
        media: Of folders of classes, ``image`` or ``audio``.
        note: What is to be said about the part that is read.
    """

    name: str
    given: str
    path: str
    columns: Mapping[str, Column]
    rows: int
    named: Mapping[str, Sequence[str]]
    splits: Mapping[str, str]
    split_column: str | None = None
    media: str = ""
    note: str = ""

    @property
    def listed(self) -> str:
        """The columns, for messages."""
        return ", ".join(str(column) for column in self.columns.values())


def read_data(given: str, name: str) -> list[DataFile]:
    """What lies at a path: one set of items, or one for each file of a folder of any names.

    Raises:
        InputError: If there is nothing that can be read.
    """
    path = Path(given).expanduser()
    _check_there(path, f"--data {given}")
    if path.is_dir() and not is_datasets_folder(path):
        inner = [child.name for child in sorted(path.iterdir()) if is_datasets_folder(child)]
        if inner:
            return [one for n in inner for one in read_data(str(Path(given) / n), n)]
    layout = read_layout(path, (), "--data")
    if None in layout:
        return [_data(name or _name(path), given, given, layout)]
    splits = split_roles([str(split) for split in layout])
    if splits:
        return [_data(name or _name(path), given, given, layout, splits)]
    held_out = next((s for s in layout if s in SPLIT_NAMES["test"]), None) or next(
        (s for s in layout if s in SPLIT_NAMES["validation"]), None
    )
    if held_out is not None:
        note = (
            f"{given} has {', '.join(map(str, layout))}: only {held_out} is read, and divided, as "
            "the experts may have been trained on the rest"
        )
        part = str(_part(path, held_out, given))
        alone: dict[str | None, RawTable] = {None: layout[held_out]}
        return [_data(name or _name(path), given, part, alone, note=note)]
    return [
        _data(str(split), given, str(_part(path, str(split), given)), {None: table})
        for split, table in layout.items()
    ]


def _name(path: Path) -> str:
    """What the items of a path are called: as the file, or as its folder where that says more."""
    full = resolved(path)
    return full.parent.name if full.stem in GENERAL and full.parent.name else full.stem


def _check_there(path: Path, where: str) -> None:
    """Refuse missing paths and folders of files without classes, with the way out.

    Raises:
        InputError: In one line.
    """
    if not path.exists():
        folder = path.parent
        children = folder.iterdir() if folder.is_dir() else ()
        near = [child.name for child in children if child.suffix.lower() in READERS]
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f"did you mean {folder / close[0]}?" if close else "check the path"
        raise InputError(
            f"{where}: expected a CSV, JSONL or Parquet file, a folder, or a task of lm_eval, "
            f"found nothing of that name; {hint}"
        )
    if not path.is_dir():
        return
    for media, suffixes in SUFFIXES.items():
        loose = [child for child in sorted(path.iterdir()) if child.suffix.lower() in suffixes]
        if loose and not any(child.is_dir() for child in path.iterdir()):
            raise InputError(
                f"--data: expected {media} files in folders of their classes, such as "
                f"{path / 'CLASS' / loose[0].name}, received {len(loose)} without; move them, or "
                "give a CSV with a column of paths and a column of classes"
            )


def split_roles(names: Sequence[str]) -> dict[str, str]:
    """Role -> name of the split among some names; empty unless all three are there."""
    lower = {name.lower(): name for name in names}
    found = {
        role: lower[known]
        for role, aliases in SPLIT_NAMES.items()
        for known in reversed(aliases)
        if known in lower
    }
    return found if len(found) == len(SPLIT_NAMES) else {}


def _part(path: Path, split: str, given: str) -> Path:
    """The file or folder of one split below a path, as it was given."""
    found = next(child for child in sorted(path.iterdir()) if split in (child.name, child.stem))
    return Path(given) / found.name


def _data(
    name: str,
    given: str,
    path: str,
    layout: Mapping[str | None, RawTable],
    splits: Mapping[str, str] | None = None,
    note: str = "",
) -> DataFile:
    raws = list(layout.values())
    columns = {
        column: _column(column, [raw.table.column(column) for raw in raws], raws[0])
        for column in raws[0].table.column_names
        if all(column in raw.table.column_names for raw in raws)
    }
    split_column = None
    if not splits:
        split_column = next((c for c in columns if c.lower() in SPLIT_COLUMNS), None)
        values = columns[split_column].values if split_column else frozenset()
        splits = split_roles([str(value) for value in values])
    return DataFile(
        name=name,
        given=given,
        path=path,
        columns=columns,
        rows=sum(raw.table.num_rows for raw in raws),
        named={column: names for raw in raws for column, names in raw.names.items()},
        splits=splits,
        split_column=split_column if splits else None,
        media=raws[0].media,
        note=note,
    )


def _column(name: str, parts: Sequence[pa.ChunkedArray], raw: RawTable) -> Column:
    import pyarrow as pa
    from pyarrow import compute

    kind = _kind(parts[0].type)
    if name == raw.media:
        return Column(name, "image" if raw.media == IMAGE else "audio")
    if kind not in ("text", "integer"):
        return Column(name, kind)
    dictionary = pa.types.is_dictionary(parts[0].type)
    plain = [part.cast(part.type.value_type) if dictionary else part for part in parts]
    values = {value for part in plain for value in compute.unique(part).to_pylist()} - {None}
    first = [str(value) for value in plain[0].slice(0, COUNTED).to_pylist() if value is not None]
    suffixes = {Path(value).suffix.lower() for value in first if len(value) < 1000}
    for media in (IMAGE, AUDIO):
        if first and kind == "text" and suffixes <= SUFFIXES[media]:
            return Column(name, "image" if media == IMAGE else "audio", len(values))
    words = [len(text.split()) for text in first]
    return Column(
        name,
        kind,
        len(values),
        frozenset(values) if len(values) <= MOST_VALUES else frozenset(),
        sum(words) / max(len(words), 1),
        max(words, default=0),
    )


def _kind(kind: pa.DataType) -> ColumnKind:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    inner = leaf(kind)
    listed = inner is not kind
    if is_text(inner):
        return "texts" if listed else "text"
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        return "image"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "image"
    if pa.types.is_integer(inner):
        return "numbers" if listed else "integer"
    if pa.types.is_floating(inner):
        return "numbers" if listed else "number"
    return "other"
