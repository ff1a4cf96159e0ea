"""The table of encodings, and the rule by which one is chosen for an operator's rows."""

from __future__ import annotations

from mergesearch.merging.kernels.spans import RowsSetting
from mergesearch.merging.operators.base import Operator, kept_form
from mergesearch.merging.resident.encodings.base import EncodedRows, Encoding, TensorRows
from mergesearch.merging.resident.encodings.dense import BF16, DENSE
from mergesearch.merging.resident.encodings.int8 import INT8
from mergesearch.merging.resident.encodings.masked import MASKED
from mergesearch.merging.resident.encodings.packed import PACKED
from mergesearch.merging.resident.encodings.stored import STORED
from mergesearch.merging.tensors.source import Options

ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding for encoding in (STORED, MASKED, PACKED, DENSE, BF16, INT8)
}


def planned_encoding(
    operator: Operator, options: Options, setting: RowsSetting = "auto"
) -> Encoding:
    """The encoding that an operator's rows are expected to have, before weights are read.

    The rule is the smallest exact one that the operator declares (``Operator.row_form``), masked
    rows packed where they keep at most half of their elements (``Operator.density``).
    """
    return ENCODINGS[kept_form(operator, options) if setting == "auto" else setting]


def rows_are_exact(setting: RowsSetting) -> bool:
    """Whether merges of rows that are kept so have the bits of an export."""
    return setting == "auto" or ENCODINGS[setting].exact


def encode(encoding: Encoding, tensor: TensorRows) -> EncodedRows:
    """The rows of a tensor in an encoding, or in fp32 where it cannot express them."""
    encoded = encoding.encode(tensor)
    if encoded is None:
        encoded = DENSE.encode(tensor)
    assert encoded is not None, "every row can be kept dense"
    return encoded
