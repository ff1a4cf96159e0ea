"""The plug-ins that a study uses: what is recorded of them, and demanded where it goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mergesearch.merging.errors import InputError
from mergesearch.merging.extensions.entry_points import WORDS, Kind, Plugin, plugins_of


@dataclass(frozen=True)
class UsedPlugin:
    """A plug-in as it is recorded, JSON-able."""

    kind: Kind
    name: str
    package: str
    version: str

    @classmethod
    def of(cls, plugin: Plugin) -> UsedPlugin:
        """What is recorded of a plug-in."""
        return cls(plugin.kind, plugin.name, plugin.package, plugin.version)

    def __str__(self) -> str:
        return f"{WORDS[self.kind]} {self.name!r} of {self.package}"


def demand(plugins: Iterable[UsedPlugin], who: str, *, any_version: bool = False) -> None:
    """Refuse to go on where a plug-in is not installed, or in another version.

    Args:
        plugins: What the study uses.
        who: Begins the message.
        any_version: Whether another version will do.

    Raises:
        InputError: In one line.
    """
    for plugin in plugins:
        found = [
            installed
            for installed in plugins_of(plugin.kind).get(plugin.name, ())
            if installed.package == plugin.package
        ]
        received = found[0].version if found else "none"
        if not found or (received != plugin.version and not any_version):
            raise InputError(
                f"{who}: expected {plugin} {plugin.version}, which the study uses, received "
                f"{received}; `pip install {plugin.package}=={plugin.version}`"
            )
