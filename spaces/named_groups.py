"""Groups that a study names: patterns of tensor names, a coefficient for each.

A pattern is a regular expression that must match a whole name; one that is no regular expression,
or matches nothing, is read as a glob (``*.mlp.*``).
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence

from mergesearch.merging import InputError, Layout
from mergesearch.spaces.groups import Group, group_of

#: Name of what no pattern matches, where one coefficient covers all of it.
REST = "others"


def named_groups(
    layout: Layout, patterns: Mapping[str, str], exclude: Collection[str] = ()
) -> tuple[Group, ...]:
    """The groups of patterns, sorted by name, so that another order in a file changes nothing.

    Args:
        layout: The tensors.
        patterns: Name of each group -> its pattern.
        exclude: Names of tensors to leave out.

    Raises:
        InputError: If a pattern matches nothing or only what is left out, or two match one tensor.
    """
    owner: dict[str, str] = {}
    groups: list[Group] = []
    for label, pattern in sorted(patterns.items()):
        where = f"space.groups.{label}"
        if not label.strip():
            raise InputError("space.groups: expected a name for every group, received an empty one")
        members = [name for name in _matches(layout.names, pattern, where) if name not in exclude]
        if not members:
            raise InputError(
                f"{where}: {pattern!r} matches only tensors that space.exclude leaves out; remove "
                "one of the two"
            )
        for name in members:
            if name in owner:
                raise InputError(
                    f"{where}: {pattern!r} matches {name!r}, which is in group {owner[name]!r} "
                    "already; narrow one of the patterns"
                )
            owner[name] = label
        groups.append(group_of(layout, label, members))
    return tuple(groups)


def _matches(names: Sequence[str], pattern: str, where: str) -> list[str]:
    """Names that a pattern matches wholly, as a regular expression or else as a glob."""
    reason = ""
    found: list[str] = []
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        reason = f" (as a regular expression: {error})"
    found = found or [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise InputError(
            f"{where}: {pattern!r} matches none of the {len(names)} tensors wholly{reason}; "
            f"{_suggestion(names, pattern)}"
        )
    return found


def _suggestion(names: Sequence[str], pattern: str) -> str:
    """What the user may have meant."""
    try:
        inside = [name for name in names if re.search(pattern, name)]
    except re.error:
        inside = []
    if inside:
        return f"parts of {len(inside)} names match, write '.*{pattern}.*' for them"
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
    return f"close names are {', '.join(map(repr, close))}"
