"""Keys of a study with the reason for each, as plain data and as YAML with comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

#: Columns of the file, comments included.
WIDTH = 96


@dataclass(frozen=True)
class Key:
    """A key of the study file.

    Attributes:
        name: The key.
        value: Plain data, which stands on one line; or a tuple of keys; or a list of such tuples.
        why: Why it has this value.
    """

    name: str
    value: Any
    why: str = ""

    @property
    def nested(self) -> bool:
        """Whether the value is a section with keys of its own."""
        return isinstance(self.value, tuple) and all(isinstance(one, Key) for one in self.value)

    @property
    def listed(self) -> bool:
        """Whether the value is a list of sections."""
        return isinstance(self.value, list) and any(isinstance(one, tuple) for one in self.value)


def plain(keys: Sequence[Key]) -> dict[str, Any]:
    """The keys as a study file has them, without reasons."""
    return {key.name: _value(key) for key in keys}


def _value(key: Key) -> Any:
    if key.nested:
        return plain(key.value)
    if key.listed:
        return [plain(one) for one in key.value]
    return key.value


def commented(keys: Sequence[Key]) -> str:
    """The keys as YAML, each with its reason above it."""
    return "\n".join(_lines(keys, 0)) + "\n"


def _lines(keys: Sequence[Key], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for key in keys:
        if key.why and depth == 0:
            yield ""
        yield from _comment(key.why, indent)
        if key.nested:
            yield f"{indent}{key.name}:"
            yield from _lines(key.value, depth + 1)
        elif key.listed:
            yield f"{indent}{key.name}:"
            for section in key.value:
                yield from _listed(section, depth + 1)
        else:
            yield f"{indent}{key.name}: {_flow(key.value)}"


def _comment(why: str, indent: str) -> list[str]:
    return textwrap.wrap(
        why,
        WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _listed(section: Sequence[Key], depth: int) -> Iterator[str]:
    """A section of a list, whose first key stands after a dash."""
    first, *others = section
    indent = "  " * depth
    yield from _comment(first.why, indent)
    yield f"{indent}- {first.name}: {_flow(_value(first))}"
    yield from _lines(others, depth + 1)


def _flow(value: Any) -> str:
    """Plain data on one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n...\n").strip()
