"""Limits on nesting, checked without recursion."""

from __future__ import annotations

from typing import Any

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.shown import shown

#: The deepest nesting of any file that we read; real ones have about ten levels.
DEPTH = 64
#: The most values of a file, counted where aliases repeat them: real ones have about 10^6.
VALUES = 20_000_000


def check_nesting(
    value: Any,
    where: str,
    error: type[InputError] = InputError,
    *,
    depth: int = DEPTH,
    values: int = VALUES,
    surrogates: bool = False,
) -> None:
    """Refuse nesting deeper than ``depth``, more than ``values`` values, and broken Unicode.

    The walk is iterative and counts a value as often as it is reached, so that neither deep input,
    nor a cycle, nor an alias bomb of YAML ("billion laughs") surprises what walks the value later.

    Args:
        value: Dictionaries and lists, nested.
        where: The file, as errors name it.
        error: The class of errors.
        depth: The deepest nesting that is accepted.
        values: The most values that are accepted.
        surrogates: Whether strings may hold lone surrogates (an escape such as ``\\ud800``), which
            no file can be written with, and so are searched for.

    Raises:
        InputError: With what was found.
    """
    level = [value]
    count = 0
    for _ in range(depth + 1):
        if surrogates:
            _check_texts(level, where, error)
        holders = [each for each in level if type(each) is dict or type(each) is list]
        # Counted before the next level is made: its size may be the product of two.
        count += sum(map(len, holders))
        if count > values:
            raise error(f"{where}: expected at most {values} values, received more")
        if not holders:
            return
        level = [inner for each in holders for inner in _inner(each, surrogates)]
    raise error(f"{where}: expected at most {depth} levels of nesting, received more")


def _inner(holder: Any, keys: bool) -> list[Any]:
    if type(holder) is list:
        return holder
    return [*holder.values(), *holder] if keys else list(holder.values())


def _check_texts(values: list[Any], where: str, error: type[InputError]) -> None:
    for each in values:
        if type(each) is str and not each.isascii():
            try:
                each.encode("utf-8")
            except UnicodeEncodeError:
                raise error(
                    f"{where}: expected Unicode text, received a lone surrogate in {shown(each)}"
                ) from None
