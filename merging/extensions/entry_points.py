"""Plug-ins: what installed packages add to the product's tables, by entry points.

A package declares them in its metadata, one group for each table::

    [project.entry-points."mergesearch.operators"]
    median = "tiny_plugin.operator:MEDIAN"

The metadata of installed packages is read when a name is not one of the product's own, and when
everything is listed; no code of a package runs before its member is used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from mergesearch.merging.errors import InputError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

#: The tables that packages may add to.
Kind = Literal["operators", "strategies", "evaluators", "spaces"]
#: Table -> the word for one of its members.
WORDS: Mapping[Kind, str] = {
    "operators": "operator",
    "strategies": "strategy",
    "evaluators": "evaluator",
    "spaces": "space",
}
#: What begins the name of every group of entry points.
PREFIX = "mergesearch."


@dataclass(frozen=True)
class Plugin:
    """A member that a package adds.

    Attributes:
        kind: The table that it is added to.
        name: Its name there.
        package: Name of the distribution package.
        version: Version of the package.
        entry: Its entry point.
    """

    kind: Kind
    name: str
    package: str
    version: str
    entry: EntryPoint = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{WORDS[self.kind]} {self.name!r} of {self.package} {self.version}"

    @property
    def origin(self) -> str:
        """The package and its version, such as ``tiny-plugin 1.0``."""
        return f"{self.package} {self.version}"

    def load(self) -> Any:
        """Import what the entry point names.

        Raises:
            InputError: If that fails, whatever the package raises.
        """
        try:
            return self.entry.load()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(
                f"{self}: expected {self.entry.value} to be imported, received {reason}; repair "
                "the package or uninstall it"
            ) from None


def plugins_of(kind: Kind) -> Mapping[str, tuple[Plugin, ...]]:
    """Name -> the plug-ins of that name, usually one."""
    return _scan(tuple(sys.path))[kind]


@lru_cache(maxsize=4)
def _scan(_path: tuple[str, ...]) -> Mapping[Kind, Mapping[str, tuple[Plugin, ...]]]:
    """Read the metadata of all packages on the path, once for each path."""
    from importlib.metadata import entry_points

    everything = entry_points()
    return {kind: _by_name(kind, everything.select(group=PREFIX + kind)) for kind in WORDS}


def _by_name(kind: Kind, entries: Iterable[EntryPoint]) -> dict[str, tuple[Plugin, ...]]:
    """Name -> plug-ins, by name and package."""
    found: dict[str, tuple[Plugin, ...]] = {}
    plugins = (_plugin(kind, entry) for entry in entries)
    for plugin in sorted(plugins, key=lambda plugin: (plugin.name, plugin.package)):
        found[plugin.name] = (*found.get(plugin.name, ()), plugin)
    return found


def _plugin(kind: Kind, entry: EntryPoint) -> Plugin:
    """The plug-in of an entry point, with the package that it belongs to."""
    if entry.dist is None:
        return Plugin(kind, entry.name, "an unnamed package", "", entry)
    return Plugin(kind, entry.name, entry.dist.name, entry.dist.version, entry)
