"""Keeps secrets out of the report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergesearch.search.redact import HIDDEN, redacted

#: Keys whose values are secret.
SECRET_KEY = re.compile(r"password|passwd|secret|token$|api_?key", re.IGNORECASE)


def without_secrets(value: Any) -> Any:
    """JSON-like ``value`` with ``***`` for secrets: of known shape, or under a telling key."""
    return redacted(_masked(value))


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: HIDDEN
            if SECRET_KEY.search(str(key)) and isinstance(item, str) and item
            else _masked(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return value
