"""Shows a value of a study file in a message of one line."""

from __future__ import annotations

import json
from typing import Any

#: Most characters that a value takes in a message.
LONGEST = 60


def shortened(value: Any) -> str:
    """A value as JSON, cut to 60 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
