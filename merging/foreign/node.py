"""Typed access to parsed values: the type is checked before a value is used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.shown import name_shown, shown


@dataclass(frozen=True)
class Node:
    """A parsed value and where it stands.

    Attributes:
        value: What JSON or YAML gave.
        where: The file and the path of keys, as errors name them.
        error: The class of errors.
    """

    value: Any
    where: str
    error: type[InputError] = InputError

    def wrong(self, expected: str, then: str = "") -> InputError:
        """The error to raise: expected this, received what stands here."""
        step = f"; {then}" if then else ""
        return self.error(f"{self.where}: expected {expected}, received {shown(self.value)}{step}")

    def has(self, key: str) -> bool:
        """Whether this is a mapping with ``key``, and not with a null there."""
        return isinstance(self.value, dict) and self.value.get(key) is not None

    def mapping(self) -> dict[str, Any]:
        """The value as a mapping whose keys are texts."""
        if not isinstance(self.value, dict):
            raise self.wrong("a mapping")
        for key in self.value:
            if not isinstance(key, str):
                raise self.error(
                    f"{self.where}: expected keys that are texts, received {shown(key)}"
                )
        return self.value

    def at(self, key: str) -> Node:
        """The member ``key``, which must be there.

        Raises:
            InputError: If this is no mapping, or has no such key.
        """
        members = self.mapping()
        if key not in members:
            raise self.error(
                f"{self.where}: expected the key {shown(key)}, received {shown(self.value)} "
                "without it"
            )
        return self._inner(members[key], key)

    def get(self, key: str, default: Any = None) -> Node:
        """The member ``key``, or a node of ``default``."""
        return self._inner(self.mapping().get(key, default), key)

    def members(self) -> Iterator[tuple[str, Node]]:
        """Keys and nodes of a mapping."""
        for key, inner in self.mapping().items():
            yield key, self._inner(inner, key)

    def elements(self) -> list[Node]:
        """Nodes of a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [self._inner(inner, str(index)) for index, inner in enumerate(self.value)]

    def text(self) -> str:
        """The value as a text."""
        if not isinstance(self.value, str):
            raise self.wrong("a text")
        return self.value

    def boolean(self) -> bool:
        """The value as true or false."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def integer(self, at_least: int = 0, below: int = 1 << 63) -> int:
        """The value as a whole number within bounds; true and false are none."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong("a whole number")
        if not at_least <= value < below:
            limit = f"of at least {at_least}" if value < at_least else f"below {below}"
            raise self.wrong(f"a whole number {limit}")
        return value

    def number(self) -> float:
        """The value as a finite number; true and false are none."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong("a number")
        if isinstance(value, int) and value.bit_length() > 1000:
            raise self.wrong("a number that fits in 64 bits")
        if not math.isfinite(value):
            raise self.wrong("a finite number")
        return float(value)

    def _inner(self, value: Any, key: str) -> Node:
        return Node(value, f"{self.where}: {name_shown(key)}", self.error)
