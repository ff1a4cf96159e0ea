"""Checks the JSON object with which a program answers; makes a measurement and its bounds of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Measurement
from mergesearch.evaluators.objectives import Metric, References
from mergesearch.evaluators.reduction import DomainScore, measure
from mergesearch.merging import InputError, MergesearchError, NonFiniteError
from mergesearch.merging.foreign.json_text import parse_json
from mergesearch.merging.foreign.shown import cut, name_shown, printable, shown

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AnswerReader:
    """Reads answers of one program.

    Attributes:
        names: Objectives that are expected, in order.
        itemised: Whether item scores are expected.
        where: Key of the study file, for messages.
        program: Name of the program, for messages.
        extra: Other scores that are expected, which need no item scores.
    """

    names: tuple[str, ...]
    itemised: bool
    where: str
    program: str
    extra: tuple[str, ...] = ()

    def parse(self, output: str, last_words: str) -> Mapping[str, Any]:
        """Parse the JSON object in the last line of the output that is not blank.

        Args:
            output: Standard output of the program.
            last_words: End of the message if there is none.

        Raises:
            MergesearchError: If there is no such object.
        """
        line = next((text for text in reversed(output.splitlines()) if text.strip()), "")
        try:
            answer = parse_json(line, "output", unique=True)
        except InputError as error:
            answer = None
            last_words = f" ({error}){last_words}" if line.lstrip()[:1] == "{" else last_words
        if not isinstance(answer, dict):
            raise self.error(
                "expected a JSON object in the last line of its output, "
                f"received {shown(line)}{cut(printable(last_words), 150)}"
            )
        return answer

    def measurement(self, answer: Mapping[str, Any], count: int) -> Measurement:
        """Check an answer, and make a measurement of it.

        Args:
            answer: Values, errors and item scores by objective.
            count: Number of items that were to be scored.

        Raises:
            MergesearchError: If the answer is not what was asked for; one line.
            NonFiniteError: If a number is not finite.
        """
        odd = sorted(set(answer) - {"values", "errors", "items"})
        if odd:
            raise self.error(f"expected keys values, errors, items, received {shown(odd[0])}")
        values = self._numbers(answer, "values", required=True)
        errors = self._numbers(answer, "errors", required=False)
        negative = next((name for name, error in errors.items() if error < 0), None)
        if negative is not None:
            raise self.error(
                f"errors: expected 0 or more, received {errors[negative]:g} for {negative!r}"
            )
        items = self._items(answer, count)
        for name, scores in items.items():
            errors.setdefault(name, float(scores.std() / math.sqrt(scores.size)))
        indices = {name: np.arange(scores.size) for name, scores in items.items()}
        return Measurement(values, errors, items, item_indices=indices)

    def error(self, problem: str) -> MergesearchError:
        """An error that names the key of the study file and the program."""
        return MergesearchError(f"{self.where}.command: {self.program}: {problem}")

    def _by_name(self, answer: Mapping[str, Any], key: str, *, required: bool) -> dict[str, Any]:
        """Objective -> what the answer holds for it under a key, in the order of the objectives."""
        given = answer.get(key) or {}
        names = [*self.names, *self.extra]
        if not isinstance(given, dict):
            raise self.error(f"{key}: expected an object, received {type(given).__name__}")
        unknown = sorted(set(given) - set(names))
        expected = self.names if key == "items" else names
        missing = [name for name in expected if name not in given]
        if unknown:
            raise self.error(
                f"{key}: expected objectives among {names}, received {shown(unknown[0])}"
            )
        if missing and required:
            raise self.error(
                f"{key}: expected all of {list(expected)}, received none for {missing[0]!r}"
            )
        return {name: given[name] for name in names if name in given}

    def _numbers(self, answer: Mapping[str, Any], key: str, *, required: bool) -> dict[str, float]:
        """Objective -> one finite number."""
        numbers = {}
        for name, value in self._by_name(answer, key, required=required).items():
            if not _is_number(value):
                raise self.error(
                    f"{key}: expected a number for {name!r}, received {_as_json(value)}"
                )
            if not _is_finite(value):
                raise NonFiniteError(f"{self.where}: {key} of {name!r}")
            numbers[name] = float(value)
        return numbers

    def _items(self, answer: Mapping[str, Any], count: int) -> dict[str, Array]:
        """Objective -> score of each item ``(count,)``."""
        given = self._by_name(answer, "items", required=self.itemised)
        if given and not self.itemised:
            raise self.error(
                "items: expected none, received some; say how many each split has, with sizes"
            )
        items = {}
        for name, scores in given.items():
            if not isinstance(scores, list) or len(scores) != count:
                received = len(scores) if isinstance(scores, list) else type(scores).__name__
                raise self.error(
                    f"items: expected {count} numbers for {name!r}, received {received}"
                )
            odd = [score for score in scores if not _is_number(score)]
            if odd:
                raise self.error(
                    f"items: expected numbers for {name!r}, received {_as_json(odd[0])}"
                )
            if not all(map(_is_finite, scores)):
                raise NonFiniteError(f"{self.where}: items of {name!r}")
            items[name] = np.array(scores, dtype=np.float64)
        return items


def with_bounds(
    measured: Measurement,
    names: Sequence[str],
    bounds: Sequence[Metric],
    references: References | None,
) -> Measurement:
    """The measurement of a program that judges itself, with how far its bounds are missed.

    Args:
        measured: Values of objectives, and of what only bounds are about.
        names: The objectives; all else is dropped.
        bounds: About values that were measured, without domains.
        references: Values of other models; None gives NaN where they are needed.

    Raises:
        NonFiniteError: If a value is not finite.
    """
    if not bounds:
        return measured
    nothing = np.empty(0, np.intp)
    scores = {
        bound.metric: {
            "": DomainScore(measured.values[bound.metric], 0.0, np.empty(0), nothing, mean=False)
        }
        for bound in bounds
    }
    checked = measure(bounds, scores, references, {}, np.empty(0, np.str_))
    return Measurement(
        {name: measured.values[name] for name in names},
        _only(measured.errors, names),
        _only(measured.items, names),
        means=checked.means,
        violations=checked.violations,
        weights=_only(measured.weights, names),
        item_indices=_only(measured.item_indices, names),
    )


def _only(by_name: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in by_name.items() if name in names}


def _as_json(value: Any) -> str:
    """A value for a message, as the program wrote it."""
    return shown(value) if isinstance(value, dict | list) else name_shown(json.dumps(value), 40)


def _is_finite(value: float) -> bool:
    """Whether a number is one of 64 bits; whole numbers may have thousands of digits."""
    return math.isfinite(value) if isinstance(value, float) else abs(value).bit_length() < 1024


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
