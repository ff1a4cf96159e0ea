"""JSON that we did not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.nested import DEPTH, check_nesting
from mergesearch.merging.foreign.reading import SETTINGS_LIMIT, read_text
from mergesearch.merging.foreign.shown import name_shown, shown


def parse_json(
    text: str,
    where: str,
    error: type[InputError] = InputError,
    *,
    unique: bool = False,
    finite: bool = False,
    depth: int = DEPTH,
) -> Any:
    """Parse JSON text.

    Args:
        text: The whole text.
        where: The file (and line), as errors name it.
        error: The class of errors.
        unique: Whether a key that stands twice in one object is refused.
        finite: Whether ``NaN`` and ``Infinity`` are refused (they are no JSON, but Python reads
            and writes them).
        depth: The deepest nesting that is accepted.

    Raises:
        InputError: If the text is no JSON, nested too deeply, or breaks a rule above.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{where}: expected each key once, received {shown(double)} twice")
        return made

    def no_number(name: str) -> NoReturn:
        raise error(f"{where}: expected finite numbers, received {name}")

    try:
        value = json.loads(
            text,
            object_pairs_hook=once if unique else None,
            parse_constant=no_number if finite else None,
        )
    except json.JSONDecodeError as cause:
        raise error(
            f"{where}: expected readable JSON, received a mistake in line {cause.lineno}, column "
            f"{cause.colno} ({cause.msg})"
        ) from None
    except RecursionError:
        raise error(f"{where}: expected at most {depth} levels of nesting, received more") from None
    except ValueError as cause:  # an integer of more than 4,300 digits
        raise error(f"{where}: expected JSON, received {name_shown(str(cause), 120)}") from None
    check_nesting(value, where, error, depth=depth, surrogates="\\u" in text)
    return value


def read_json(
    file: Path,
    error: type[InputError] = InputError,
    *,
    limit: int = SETTINGS_LIMIT,
    unique: bool = False,
    finite: bool = False,
) -> Any:
    """Read a file of JSON; see ``read_text`` and ``parse_json`` for what is refused.

    Raises:
        InputError: Of the class ``error``.
    """
    where = name_shown(str(file), 200)
    return parse_json(read_text(file, limit, error), where, error, unique=unique, finite=finite)
