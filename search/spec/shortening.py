"""Shows a value of a study file in a message of one line."""

from __future__ import annotations

import json
from typing import Any

from mergesearch.merging.foreign.shown import cut, printable

#: Most characters that a value takes in a message.
LONGEST = 60


def shortened(value: Any) -> str:
    """A value as JSON, cut to 60 characters."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        value = cut(value, 2 * LONGEST)  # before it is written, which takes as long as it is long
    try:
        text = printable(json.dumps(value, default=repr))
    except (ValueError, RecursionError):  # a number of 5,000 digits inside, or a cycle
        text = type(value).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
