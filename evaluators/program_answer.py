"""Checks the JSON object with which a program answers, and makes a measurement of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Measurement
from mergesearch.merging import MergesearchError, NonFiniteError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AnswerReader:
    """Reads answers of one program.

    Attributes:
        names: Objectives that are expected, in order.
        itemised: Whether item scores are expected.
        where: Key of the study file, for messages.
        program: Name of the program, for messages.
    """

    names: tuple[str, ...]
    itemised: bool
    where: str
    program: str

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
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self.error(
                "expected a JSON object in the last line of its output, "
                f"received {line[:80]!r}{last_words}"
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
            raise self.error(f"expected keys values, errors, items, received {odd[0]!r}")
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
        names = list(self.names)
        if not isinstance(given, dict):
            raise self.error(f"{key}: expected an object, received {type(given).__name__}")
        unknown = sorted(set(given) - set(names))
        missing = [name for name in names if name not in given]
        if unknown:
            raise self.error(f"{key}: expected objectives among {names}, received {unknown[0]!r}")
        if missing and required:
            raise self.error(f"{key}: expected all of {names}, received none for {missing[0]!r}")
        return {name: given[name] for name in names if name in given}

    def _numbers(self, answer: Mapping[str, Any], key: str, *, required: bool) -> dict[str, float]:
        """Objective -> one finite number."""
        numbers = {}
        for name, value in self._by_name(answer, key, required=required).items():
            if not _is_number(value):
                raise self.error(
                    f"{key}: expected a number for {name!r}, received {json.dumps(value)[:40]}"
                )
            if not math.isfinite(value):
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
                    f"items: expected numbers for {name!r}, received {json.dumps(odd[0])[:40]}"
                )
            items[name] = np.array(scores, dtype=np.float64)
            if not np.isfinite(items[name]).all():
                raise NonFiniteError(f"{self.where}: items of {name!r}")
        return items


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
