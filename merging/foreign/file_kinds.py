"""What kind of file lies at a path, in words for messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergesearch.merging.foreign.shown import name_shown

#: Suffix -> what such a file is.
KINDS: Mapping[str, str] = {
    ".csv": "a CSV file",
    ".tsv": "a TSV file",
    ".json": "a JSON file",
    ".jsonl": "a file of JSON lines",
    ".ndjson": "a file of JSON lines",
    ".parquet": "a Parquet file",
    ".arrow": "an Arrow file",
    ".xls": "an Excel file",
    ".xlsx": "an Excel file",
    ".ods": "a spreadsheet",
    ".txt": "a text file",
    ".md": "a text file",
    ".yaml": "a YAML file",
    ".yml": "a YAML file",
    ".zip": "a ZIP archive",
    ".tar": "a tar archive",
    ".gz": "a compressed file",
    ".npy": "a NumPy array",
    ".npz": "NumPy arrays",
    ".pkl": "a pickle",
    ".pt": "a file of torch",
    ".bin": "a binary file",
    ".safetensors": "weights in safetensors",
    ".gguf": "weights in GGUF",
    ".db": "a database",
    ".sqlite": "a database",
}


def kind_of(path: Path) -> str:
    """What lies at a path by its suffix, such as ``a CSV file``; ``a folder`` for a folder."""
    if path.is_dir():
        return "a folder"
    suffix = path.suffix.lower()
    other = f"a {name_shown(suffix, 20)} file" if suffix else "a file without a suffix"
    return KINDS.get(suffix, other)
