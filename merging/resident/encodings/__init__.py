"""Encodings: forms in which an arena may keep rows, one file each, and the rule that chooses."""

from mergesearch.merging.resident.encodings.base import (
    EncodedRow,
    EncodedRows,
    Encoding,
    TensorRows,
)
from mergesearch.merging.resident.encodings.table import (
    ENCODINGS,
    encode,
    planned_encoding,
)

__all__ = [
    "ENCODINGS",
    "EncodedRow",
    "EncodedRows",
    "Encoding",
    "TensorRows",
    "encode",
    "planned_encoding",
]
