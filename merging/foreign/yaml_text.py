"""YAML that we did not write: plain data only, each key once."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.nested import DEPTH, check_nesting
from mergesearch.merging.foreign.reading import MIB, read_text
from mergesearch.merging.foreign.shown import name_shown, printable

#: The largest YAML file that is read; the parser takes about ten seconds a MiB.
YAML_LIMIT = 4 * MIB
#: The largest whole number: above it, no float holds it.
LARGEST_BITS = 1000
#: The most values; aliases may repeat a value many times.
YAML_VALUES = 1_000_000


class _PlainLoader(yaml.SafeLoader):
    """The safe loader, but a key that stands twice in one mapping is an error.

    It is the parser in Python: the one in C overflows its stack on deep input.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)

    def whole_number(self, node: Any) -> int:
        """Make an int; one of very many digits is written by nobody, and cannot be printed."""
        value = self.construct_yaml_int(node)
        if value.bit_length() > LARGEST_BITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a whole number of {value.bit_length()} bits", node.start_mark
            )
        return value

    def date(self, node: Any) -> str:
        """Read a date as the text that stands there; one that is no date is an error."""
        self.construct_yaml_timestamp(node)
        return str(node.value)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.whole_number)
_PlainLoader.add_constructor("tag:yaml.org,2002:timestamp", _PlainLoader.date)
# JSON has neither bytes, nor sets, nor pairs.
for _kind in ("binary", "set", "omap", "pairs"):
    _PlainLoader.yaml_constructors.pop(f"tag:yaml.org,2002:{_kind}")


class _TaggedLoader(yaml.SafeLoader):
    """The safe loader, to which a value with a tag of a program, such as ``!function``, is None."""


_TaggedLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def parse_yaml(text: str, where: str, error: type[InputError] = InputError) -> Any:
    """Parse one YAML document of plain data.

    Args:
        text: The whole text.
        where: The file (or option), as errors name it.
        error: The class of errors.

    Raises:
        InputError: If the text is no YAML, has tags of objects, a key twice, is nested too deeply,
            or repeats itself by aliases; with line and column where they are known.
    """
    return _parsed(text, where, error, _PlainLoader)


def parse_tagged_yaml(text: str, where: str, error: type[InputError] = InputError) -> Any:
    """Parse a document of another program: as ``parse_yaml``, but keys may stand twice.

    A value with a tag of that program is None.
    """
    return _parsed(text, where, error, _TaggedLoader)


def local_tags(text: str) -> set[str]:
    """The tags of a program, such as ``!function``, in a document that can be parsed."""
    tags = (getattr(event, "tag", None) for event in yaml.parse(text, yaml.SafeLoader))
    return {tag for tag in tags if tag is not None and tag.startswith("!")}


def _parsed(text: str, where: str, error: type[InputError], loader: type[yaml.SafeLoader]) -> Any:
    try:
        value = yaml.load(text, loader)  # a subclass of the safe loader
    except yaml.YAMLError as cause:
        raise error(f"{where}: expected YAML, received a mistake{_place(cause)}") from None
    except RecursionError:
        raise error(f"{where}: expected at most {DEPTH} levels of nesting, received more") from None
    except (ValueError, TypeError, OverflowError, AttributeError, KeyError, IndexError) as cause:
        # Dates such as 2001-99-99, keys that are lists, integers of 5,000 digits.
        raise error(
            f"{where}: expected YAML, received a value that cannot be read "
            f"({name_shown(str(cause), 120)})"
        ) from None
    check_nesting(value, where, error, values=YAML_VALUES, surrogates="\\u" in text)
    return value


def _place(cause: yaml.YAMLError) -> str:
    mark = getattr(cause, "problem_mark", None)
    problem = getattr(cause, "problem", None) or getattr(cause, "reason", None) or str(cause)
    place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
    return f"{place} ({name_shown(printable(str(problem)), 120)})"


def read_yaml(
    file: Path,
    error: type[InputError] = InputError,
    *,
    limit: int = YAML_LIMIT,
    what: str = "a file",
) -> Any:
    """Read a file of YAML; see ``read_text`` and ``parse_yaml`` for what is refused.

    Raises:
        InputError: Of the class ``error``.
    """
    text = read_text(file, limit, error, what=what)
    return parse_yaml(text, name_shown(str(file), 200), error)
