"""Values of tensors as mergekit's settings: one number, or filters of names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from mergesearch.merging.mergekit_format.settings import Place, value_at

#: Block and what follows it: ``model.layers.3.`` and ``mlp.up_proj.weight``.
_BLOCK = re.compile(r"(?P<block>.*?\.\d+\.)(?P<rest>.*)")
#: A pattern at the beginning of names that have no block.
OUTSIDE = r"(?!.*?\.\d+\.)"


def setting_of(
    names: Sequence[str], values: Sequence[float], rest: float | None = None
) -> Any | None:
    """A setting with these values at these tensors; None where filters cannot tell them apart.

    Filters are parts of names, and the first that is met counts. Blocks, or what follows them, are
    tried before single names; the shortest setting that gives every value back is taken.

    Args:
        names: The tensors.
        values: Their values.
        rest: The value without a filter; by default the commonest one.
    """
    wanted = dict(zip(names, values, strict=True))
    if len(set(values)) == 1 and rest in (None, values[0]):
        return values[0]
    if rest is None:
        ((rest, _),) = Counter(values).most_common(1)
    ways: tuple[Callable[[str], str], ...] = (block_of, _rest, lambda name: "")
    found = [_filters(wanted, way, rest) for way in ways]
    good = [
        setting
        for setting in found
        if all(value_at(setting, Place(name)) == value for name, value in wanted.items())
    ]
    return min(good, key=len, default=None)


def _filters(
    wanted: dict[str, float], part_of: Callable[[str], str], rest: float
) -> list[dict[str, Any]]:
    """Filters by a part of names, single names before them, and what needs no filter last."""
    by_part: dict[str, list[float]] = {}
    for name, value in wanted.items():
        by_part.setdefault(part_of(name), []).append(value)
    parts = {part: Counter(values).most_common(1)[0][0] for part, values in by_part.items() if part}
    single = {
        name: value for name, value in wanted.items() if parts.get(part_of(name), rest) != value
    }
    longest_first = sorted(single.items(), key=lambda item: -len(item[0]))
    filters = [*longest_first, *((part, value) for part, value in parts.items() if value != rest)]
    return [*({"filter": text, "value": value} for text, value in filters), {"value": rest}]


def block_of(name: str) -> str:
    """The beginning of a name up to its first number, such as ``model.layers.3.``, or nothing."""
    match = _BLOCK.match(name)
    return "" if match is None else match["block"]


def _rest(name: str) -> str:
    match = _BLOCK.match(name)
    return "" if match is None else match["rest"]
