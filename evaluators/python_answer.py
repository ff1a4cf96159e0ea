"""Checks what a Python function returns, and makes numbers and scores of items of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Measurement
from mergesearch.merging import MergesearchError, NonFiniteError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What a function says of one model.

    Attributes:
        values: Objective -> value, for those without scores of items.
        items: Objective -> score of each item ``(items,)``, whose mean is the value.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    items: Mapping[str, Array] = field(default_factory=dict)

    def at(self, indices: npt.NDArray[np.intp]) -> Scores:
        """The scores of some items only."""
        return Scores(self.values, {name: scores[indices] for name, scores in self.items.items()})

    def measurement(self, indices: npt.NDArray[np.intp] | None = None) -> Measurement:
        """A measurement, with the standard errors of means over items.

        Args:
            indices: Where the items lie among all of the split; default: they are all.
        """
        values = {**self.values, **{name: float(s.mean()) for name, s in self.items.items()}}
        errors = {name: float(s.std() / np.sqrt(s.size)) for name, s in self.items.items()}
        at = {name: np.arange(s.size) if indices is None else indices for name, s in _sized(self)}
        weights = {name: np.full(s.size, 1 / s.size) for name, s in _sized(self)}
        return Measurement(values, errors, dict(self.items), weights=weights, item_indices=at)


def _sized(scores: Scores) -> list[tuple[str, Array]]:
    return list(scores.items.items())


def declared_answer(function: Callable[..., Any]) -> Literal["number", "items", "unknown"]:
    """What a function returns by its annotation: one number, scores of items, or not said."""
    try:
        answer = get_type_hints(function).get("return")
    except (AttributeError, NameError, SyntaxError, TypeError):  # no hints, or types not there
        return "unknown"
    if _is_kind(answer, Mapping) and len(get_args(answer)) == 2:
        answer = get_args(answer)[1]
    if answer in (int, float):
        return "number"
    return "items" if _is_kind(answer, (Sequence, np.ndarray)) else "unknown"


def _is_kind(answer: Any, kinds: Any) -> bool:
    """Whether a type, or the type of which it is a kind, is one of the kinds; no text is."""
    plain = get_origin(answer) or answer
    return isinstance(plain, type) and issubclass(plain, kinds) and not issubclass(plain, str)


def read_scores(answer: Any, names: tuple[str, ...], who: str) -> Scores:
    """Check what a function returned.

    Args:
        answer: A number, or objective -> number or scores of items.
        names: Objectives that are expected.
        who: Names the function in messages.

    Raises:
        MergesearchError: If it is something else; one line.
        NonFiniteError: If a number is not finite.
    """
    if not isinstance(answer, Mapping):
        if len(names) > 1:
            raise MergesearchError(
                f"{who}: expected a mapping with a value for each of {list(names)}, received "
                f"{type(answer).__name__}"
            )
        answer = {names[0]: answer}
    odd = sorted({*map(str, answer)} ^ {*names})
    if odd:
        raise MergesearchError(
            f"{who}: expected a value for each of {list(names)} and no other, missing or unknown: "
            f"{odd[0]!r}; name the objectives of the study as the function does"
        )
    numbers = {name: _numbers(answer[name], name, who) for name in names}
    lengths = {name: scores.size for name, scores in numbers.items() if scores.ndim}
    if len({*lengths.values()}) > 1:
        raise MergesearchError(
            f"{who}: expected scores of the same items for every objective, received {lengths}"
        )
    return Scores(
        {name: float(value) for name, value in numbers.items() if not value.ndim},
        {name: scores for name, scores in numbers.items() if scores.ndim},
    )


def _numbers(value: Any, name: str, who: str) -> Array:
    """A number as an array ``()``, or scores of items ``(items,)``."""
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu().double().numpy()
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.empty((0, 0))
    if numbers.ndim > 1 or not numbers.size or value is None or isinstance(value, str):
        raise MergesearchError(
            f"{who}: expected a number or a list of numbers for {name!r}, received "
            f"{' '.join(repr(value).split())[:60]}"
        )
    if not np.isfinite(numbers).all():
        raise NonFiniteError(f"{who}: {name!r}")
    return numbers
