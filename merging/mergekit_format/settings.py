"""Values that depend on where a tensor is: mergekit's gradients and filters.

A setting is a number (or a truth value); a *gradient*, a list of numbers over the depth of a slice,
with straight lines between them; or a list of ``{filter: TEXT, value: SETTING}``, of which the
first one counts whose text is part of the tensor's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.merging.foreign.shown import shown

#: Filters that every tensor passes.
ALL = (None, "*")


@dataclass(frozen=True)
class Place:
    """Where a tensor is, as settings see it.

    Attributes:
        name: Name of the tensor.
        slice: Number of the output slice whose parameters it takes.
        depth: 0 in the first block of the slice, 1 in the last; 0 outside the blocks.
        size: Number of elements.
    """

    name: str
    slice: int = 0
    depth: float = 0.0
    size: int = 1


def setting_problem(setting: Any) -> str | None:
    """Why a setting is none, or None."""
    if _conditions(setting) is None:
        return _value_problem(setting)
    for condition in _conditions(setting) or ():
        odd = set(condition) - {"filter", "value"}
        if odd or "value" not in condition:
            return f"expected {{filter: TEXT, value: NUMBER}}, received {shown(dict(condition))}"
        if not isinstance(condition.get("filter"), str | None):
            return f"expected a text as filter, received {shown(condition['filter'])}"
        reason = _value_problem(condition["value"])
        if reason is not None:
            return reason
    return None


def _value_problem(value: Any) -> str | None:
    numbers = value if isinstance(value, list) else [value]
    if numbers and all(_number(number) is not None for number in numbers):
        return None
    return f"expected a number, a list of numbers over depth or filters, received {shown(value)}"


def value_at(setting: Any, place: Place) -> float | None:
    """The value of a setting at a tensor; None where no filter lets it through."""
    conditions = _conditions(setting)
    if conditions is None:
        return _along(setting, place.depth)
    for condition in conditions:
        text = condition.get("filter")
        if text in ALL or str(text) in place.name:
            return _along(condition["value"], place.depth)
    return None


def filters_of(setting: Any) -> list[str]:
    """Texts of the filters of a setting, those that every tensor passes left out."""
    conditions = _conditions(setting) or ()
    return [str(each["filter"]) for each in conditions if each.get("filter") not in ALL]


def gradients_of(setting: Any) -> Iterator[Sequence[Any]]:
    """The lists over depth of a setting."""
    values = [each["value"] for each in _conditions(setting) or ({"value": setting},)]
    yield from (value for value in values if isinstance(value, list) and len(value) > 1)


def varies(setting: Any) -> bool:
    """Whether a setting depends on the tensor."""
    return bool(filters_of(setting)) or any(gradients_of(setting))


def _conditions(setting: Any) -> Sequence[Mapping[str, Any]] | None:
    """The filters of a setting; None where it has none."""
    if isinstance(setting, Mapping):
        return [setting]
    if isinstance(setting, list) and setting and all(isinstance(e, Mapping) for e in setting):
        return setting
    return None


def _along(value: Any, depth: float) -> float:
    """A number, or the value of a gradient at a depth; truth values step."""
    if not isinstance(value, list):
        return _known(value)
    place = depth * (len(value) - 1)
    left = int(place)
    if any(isinstance(each, bool) for each in value):
        return _known(value[left])
    right = min(len(value) - 1, left + 1)
    share = place - left
    return (1 - share) * _known(value[left]) + share * _known(value[right])


def _known(value: Any) -> float:
    number = _number(value)
    assert number is not None
    return number


def _number(value: Any) -> float | None:
    """A finite number; YAML 1.1 reads 1e-3 as text, which can only have been meant as a number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
