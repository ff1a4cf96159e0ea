"""Words of errors and warnings about tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from mergesearch.merging.foreign.shown import shown
from mergesearch.merging.tensors.layout import natural_key

_SHOWN = 6  # names listed before the rest is only counted


def listed(names: Iterable[str]) -> str:
    """Names in natural order, the first few of them where there are many."""
    ordered = sorted(names, key=natural_key)
    text = ", ".join(shown(name, 60) for name in ordered[:_SHOWN])
    if len(ordered) <= _SHOWN:
        return text
    return f"{text} and {len(ordered) - _SHOWN} more ({len(ordered)} in all)"


def kind_of(name: str) -> str:
    """A tensor's name with ``#`` for its numbers, which it shares with its like in other blocks."""
    return re.sub(r"(?<![A-Za-z])\d+(?![A-Za-z])", "#", name)


def warn(message: str | None) -> None:
    """Warn in one line, if there is anything to say."""
    if message:
        warnings.warn(message, stacklevel=3)
