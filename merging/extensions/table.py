"""A table of the product: its own members, those of plug-ins, and those that a program gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from mergesearch.merging.errors import InputError
from mergesearch.merging.extensions.entry_points import WORDS, Kind, Plugin, plugins_of
from mergesearch.merging.extensions.references import is_reference, known, source_digest

T = TypeVar("T")

#: ``(name, object, origin, label)`` -> member. The origin tells versions of the object apart; the
#: label names it in messages.
Accept = Callable[[str, Any, str, str], T]


class Table(Mapping[str, T], Generic[T]):
    """Members by name; those of plug-ins are loaded when they are asked for.

    Iteration gives the names of the product's own members, then those of plug-ins. The product's
    own win where names clash (:meth:`check`).

    Args:
        kind: Which table it is.
        own: The product's own members.
        accept: Makes a member of what a plug-in or a program gives, or refuses it.
    """

    def __init__(self, kind: Kind, own: Mapping[str, T], accept: Accept[T]) -> None:
        self.own = own
        self._kind = kind
        self._accept = accept
        self._loaded: dict[Plugin, Any] = {}
        self._accepted: dict[str, tuple[Any, T]] = {}  # name -> object, and the member made of it

    def __getitem__(self, name: str) -> T:
        """The member of a name.

        Raises:
            KeyError: If there is none.
            InputError: If it is broken, or two packages add one of that name.
        """
        if name in self.own:
            return self.own[name]
        if is_reference(name):
            value = known(name)
            if value is None:
                raise KeyError(name)
            return self._member(name, value, source_digest, f"{WORDS[self._kind]} {name}")
        plugin = self.plugin(name)
        if plugin is None:
            raise KeyError(name)
        if plugin not in self._loaded:
            self._loaded[plugin] = plugin.load()
        return self._member(name, self._loaded[plugin], lambda _: plugin.origin, str(plugin))

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from (name for name in plugins_of(self._kind) if name not in self.own)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        if name in self.own:
            return True
        if not isinstance(name, str):
            return False
        return known(name) is not None if is_reference(name) else name in plugins_of(self._kind)

    def plugin(self, name: str) -> Plugin | None:
        """The plug-in that adds a name; None for all other members.

        Raises:
            InputError: If two packages add it.
        """
        if name in self.own:
            return None
        found = plugins_of(self._kind).get(name, ())
        if len(found) > 1:
            both = " and ".join(plugin.origin for plugin in found)
            raise InputError(
                f"{WORDS[self._kind]} {name!r}: expected one package that adds it, received "
                f"{both}; uninstall one of them"
            )
        return found[0] if found else None

    def check(self, name: str) -> None:
        """Refuse a name that means one of the product's own members and a plug-in's.

        Raises:
            InputError: In one line.
        """
        if name in self.own and plugins_of(self._kind).get(name):
            raise InputError(self._clash(plugins_of(self._kind)[name][0]))

    def problems(self) -> dict[str, str]:
        """Name -> why a plug-in of that name cannot be used; loads all of them."""
        problems = {}
        for name in plugins_of(self._kind):
            try:
                self.check(name)
                self[name]
            except InputError as error:
                problems[name] = str(error)
        return problems

    def _member(self, name: str, value: Any, origin: Callable[[Any], str], label: str) -> T:
        if name not in self._accepted or self._accepted[name][0] is not value:
            self._accepted[name] = value, self._accept(name, value, origin(value), label)
        return self._accepted[name][1]

    def _clash(self, plugin: Plugin) -> str:
        return (
            f"{plugin}: expected a name that is free, received that of a built-in "
            f"{WORDS[self._kind]}; rename the entry point, or uninstall the package"
        )
