"""Foreign text made safe to print: on a terminal, in logs, in reports and in cards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

#: The most characters of one foreign value in a message.
VALUE_LIMIT = 80
#: The most characters of one message.
MESSAGE_LIMIT = 300
#: The most characters of all paths in a message that do not count.
PATHS_LIMIT = 400

# C0 and C1 controls, line separators, zero-width and bidirectional marks, lone surrogates and
# tags: they move the cursor, hide text or turn its direction ("Trojan Source", CVE-2021-42574).
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str, *, keep: str = "") -> str:
    """Write control, invisible and bidirectional characters as escapes such as ``\\x1b``.

    Args:
        text: Any text.
        keep: Characters that stay as they are, for example ``"\\n"`` where lines are wanted.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def printable_json(text: str) -> str:
    """:func:`printable`, but in the escapes of JSON, so that JSON inside stays what it is.

    Line breaks and tabs stay.
    """
    return _UNSAFE.sub(
        lambda found: found[0] if found[0] in "\n\t" else _json_escape(found[0]), text
    )


def _json_escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 1 << 16 else json.dumps(character)[1:-1]


def all_shown(value: Any) -> Any:
    """A copy of JSON-like data whose texts are printable and have at most 300 characters."""
    if isinstance(value, str):
        return cut(printable(value))
    if isinstance(value, Mapping):
        return {all_shown(key): all_shown(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [all_shown(inner) for inner in value]
    return value


def _escaped(character: str) -> str:
    return (
        character.encode("ascii", "backslashreplace").decode()
        if character > "\x7f"
        else (repr(character)[1:-1])
    )


def cut(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Shorten text to ``limit`` characters; the middle goes, since both ends tell something."""
    if len(text) <= limit:
        return text
    left = (limit - 5) * 2 // 3
    right = limit - 5 - left
    return f"{text[:left]} ... {text[len(text) - right :]}"


def message_cut(text: str) -> str:
    """Shorten a message to ``MESSAGE_LIMIT`` characters beside the paths that it names.

    A long place of a run folder must not cost the rest of the message. Paths count up to
    ``PATHS_LIMIT`` characters together.
    """
    paths = sum(len(word) for word in text.split(" ") if "/" in word)
    return cut(text, MESSAGE_LIMIT + min(paths, PATHS_LIMIT))


def line_cut(line: str) -> str:
    """Shorten a line of an error to what :func:`message_cut` grants at most, paths or not."""
    return cut(line, MESSAGE_LIMIT + PATHS_LIMIT)


def shown(value: Any, limit: int = VALUE_LIMIT) -> str:
    """A foreign value as a message shows it: its ``repr``, printable and short.

    The ``repr`` of a container is never made: it may be nested deeply, or be gigabytes long.
    """
    if isinstance(value, dict):
        return f"a mapping of {len(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return printable(repr(cut(value, limit)))
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    return printable(cut(repr(value), limit))


def name_shown(name: str, limit: int = VALUE_LIMIT) -> str:
    """A foreign name (a key, a tensor, a file) without quotes, printable and short."""
    return cut(printable(cut(name, limit)), limit)


def path_shown(path: object) -> str:
    """A path in a message: printable, and at most 200 characters."""
    return name_shown(str(path), 200)


def shown_names(names: Iterable[str]) -> str:
    """Names in brackets for a message, sorted, the first few of them."""
    ordered = sorted(names)
    more = f", and {len(ordered) - 6} more" if len(ordered) > 6 else ""
    return f"[{', '.join(shown(name, 40) for name in ordered[:6])}{more}]"
