"""Coefficients as people write them: one number, by group, by tensor, by pattern, by expert.

::

    coefficients: 0.3
    coefficients: {rotated: 0.4, mirrored: 0.2}      # an expert that is not named gets 0
    coefficients:
      default: 0.3
      block 3: {rotated: 0.4, mirrored: 0.1}          # a group
      classifier.weight: 0.5                          # a tensor
      '.*\\.attention\\..*': [0.1, 0.5]                 # a pattern of whole names, all experts

What names one tensor comes before what names many: a tensor's own name, then groups, small ones
first, then patterns in their order, then ``default``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mergesearch.merging.errors import RecipeError, did_you_mean
from mergesearch.merging.foreign.shown import name_shown, shown
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout

#: Name of a group -> the names of its tensors.
Groups = Mapping[str, Collection[str]]
DEFAULT = "default"


def field_of(
    value: Any, layout: Layout, experts: Sequence[str], directions: int, groups: Groups
) -> Field:
    """The field that written coefficients describe.

    Args:
        value: As read from YAML.
        layout: The tensors.
        experts: Names of the experts.
        directions: Number of coefficients at every position.
        groups: Groups that may be named.

    Raises:
        RecipeError: If a name is of no group, tensor or expert and matches nothing, a number is
            none, or a tensor gets no coefficient.
    """
    if not isinstance(value, dict) or _by_expert(value, experts):
        return Field.constant(layout.size, _row("coefficients", value, experts, directions))
    rows = {
        str(key): _row(f"coefficients.{name_shown(str(key))}", each, experts, directions)
        for key, each in value.items()
    }
    found = _Rows(rows, layout, groups)
    return _tensor_field(layout, [found.of(name) for name in layout.names])


def written_coefficients(
    field: Field, layout: Layout, experts: Sequence[str], groupings: Sequence[Groups]
) -> Any | None:
    """Coefficients as one would write them; None where they vary inside a tensor.

    :func:`field_of` gives the same coefficients back, to the bit.

    Args:
        field: The coefficients.
        layout: The tensors.
        experts: Names of the experts.
        groupings: Ways to divide all tensors into groups, coarse ones first; the first whose groups
            have one coefficient each is used, and single tensors where none has.
    """
    by_tensor = rows_by_tensor(field, layout)
    if by_tensor is None:
        return None
    singles = {name: (name,) for name in by_tensor}
    everything = {DEFAULT: tuple(by_tensor)}
    for groups in (everything, *groupings, singles):
        rows = _by_group(by_tensor, groups)
        if rows is not None:
            shown = {label: _shown(row, experts) for label, row in rows.items()}
            return shown[DEFAULT] if groups is everything else shown
    return None


class _Rows:
    """The row of a tensor by the rules of :func:`field_of`."""

    def __init__(self, rows: Mapping[str, list[float]], layout: Layout, groups: Groups) -> None:
        self._default = rows.get(DEFAULT)
        self._named: dict[str, list[float]] = {}
        grouped: dict[str, tuple[int, str, list[float]]] = {}
        self._patterns: list[tuple[re.Pattern[str], list[float]]] = []
        for key, row in rows.items():
            if key in layout.by_name:
                self._named[key] = row
            elif key in groups:
                _add_group(grouped, key, groups[key], row)
            elif key != DEFAULT:
                self._patterns.append((_pattern(key, layout, groups), row))
        self._named = {name: row for name, (_, _, row) in grouped.items()} | self._named

    def of(self, name: str) -> list[float]:
        """The row of a tensor."""
        row = self._named.get(name)
        if row is None:
            matching = (row for pattern, row in self._patterns if pattern.fullmatch(name))
            row = next(matching, self._default)
        if row is None:
            raise RecipeError(
                f"coefficients: no pattern matches tensor {name!r}; add `default: NUMBER`, the "
                "tensor's name, its group or another pattern"
            )
        return row


def _add_group(
    grouped: dict[str, tuple[int, str, list[float]]],
    label: str,
    tensors: Collection[str],
    row: list[float],
) -> None:
    """Give the tensors of a group its row, unless a smaller one has them."""
    ours = (len(tensors), label, row)
    for name in tensors:
        theirs = grouped.get(name, ours)
        if theirs[0] == ours[0] and theirs[2] != row:
            raise RecipeError(
                f"coefficients.{label}: expected one coefficient for tensor {name!r}, received "
                f"another by {theirs[1]!r}, which is as large; name the tensor"
            )
        grouped[name] = min(ours, theirs, key=lambda each: each[0])


def _pattern(key: str, layout: Layout, groups: Groups) -> re.Pattern[str]:
    where = f"coefficients.{name_shown(key)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets inside sets
            pattern = re.compile(key)
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeError(
            f"{where}: expected a regular expression, or the name of a group or tensor, "
            f"received: {error}"
        ) from error
    if not any(pattern.fullmatch(name) for name in layout.names):
        hint = f"; of groups, {did_you_mean(key, groups)}" if groups else ""
        raise RecipeError(f"{where}: matches no tensor; there are {_some(layout.names)}{hint}")
    return pattern


def _by_expert(value: Mapping[Any, Any], experts: Sequence[str]) -> bool:
    return bool(value) and all(key in experts for key in value)


def _row(key: str, value: Any, experts: Sequence[str], directions: int) -> list[float]:
    if isinstance(value, dict):
        return _expert_row(key, value, experts, directions)
    numbers = value if isinstance(value, list) else [value] * directions
    if len(numbers) != directions:
        raise RecipeError(
            f"{key}: expected one number or a list of {directions}, received a list of "
            f"{len(numbers)}"
        )
    return [_number(key, number) for number in numbers]


def _expert_row(
    key: str, value: Mapping[Any, Any], experts: Sequence[str], directions: int
) -> list[float]:
    if directions != len(experts):
        raise RecipeError(
            f"{key}: expected one number or a list of {directions}, as the operator's directions "
            "are not those of the experts, received names"
        )
    for name in value:
        if name not in experts:
            raise RecipeError(
                f"{key}.{name_shown(str(name))}: expected the name of an expert; "
                f"{did_you_mean(str(name), experts)}"
            )
    return [_number(f"{key}.{name}", value.get(name, 0.0)) for name in experts]


def _number(key: str, value: Any) -> float:
    try:
        # YAML 1.1 reads 1e-3 as text; it can only have been meant as a number.
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(f"{key}: expected a finite number, received {shown(value)}")
    return number


def _tensor_field(layout: Layout, rows: Sequence[list[float]]) -> Field:
    # An empty tensor owns no position, so it cannot start a segment.
    pairs = [(spec.start, row) for spec, row in zip(layout.tensors, rows, strict=True) if spec.size]
    boundaries = [start for start, _ in pairs] + [layout.size]
    return Field(np.array(boundaries), np.array([row for _, row in pairs]).T).compact()


def rows_by_tensor(field: Field, layout: Layout) -> dict[str, tuple[float, ...]] | None:
    """Tensor -> its row; None where a row varies inside one. Padding counts for nothing."""
    rows = {}
    for spec in layout.tensors:
        if not spec.size:
            rows[spec.name] = (0.0,) * field.directions
            continue
        part = field.restrict(spec.start, spec.stop).compact()
        if part.segments > 1:
            return None
        rows[spec.name] = tuple(part.values[:, 0].tolist())
    return rows


def _by_group(
    by_tensor: Mapping[str, tuple[float, ...]], groups: Groups
) -> dict[str, tuple[float, ...]] | None:
    """Group -> its row; None where one has several, or a tensor is in none."""
    rows: dict[str, tuple[float, ...]] = {}
    covered = 0
    for label, tensors in groups.items():
        found = {by_tensor[name] for name in tensors}
        if len(found) != 1:
            return None
        covered += len(tensors)
        (rows[label],) = found
    return rows if covered == len(by_tensor) else None


def _shown(row: Sequence[float], experts: Sequence[str]) -> Any:
    """A row by expert; a list where directions are not experts, a number where all are equal."""
    if len(set(row)) == 1:
        return row[0]
    return dict(zip(experts, row, strict=True)) if len(row) == len(experts) else list(row)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more
