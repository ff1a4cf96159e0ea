"""Names of version 0.1: refused in a study file, read in the folder of an old run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mergesearch.merging import InputError


class Renamed(NamedTuple):
    """A name of 0.1 that stands in a study: where, what, and what it is called now."""

    key: str
    old: str
    new: str


#: Strategies: old name -> new name.
STRATEGIES = {"random": "sobol"}
#: Options of strategies: old key -> new key.
OPTIONS = {"chains": "restarts_in_parallel"}
#: Values in the section ``fidelity``: key -> old value -> new value.
FIDELITY = {"order": {"anchors": "representative"}, "estimate": {"anchors": "representative"}}


def refuse_old_names(data: Mapping[str, Any], where: str) -> None:
    """Refuse names of 0.1; ``where`` names the file.

    Raises:
        InputError: In one line that tells the new name.
    """
    for key, old, new in _rename(copy.deepcopy(dict(data))):
        raise InputError(f"{where}: {key}: {old!r} is called {new!r} since 0.2; rename it")


def with_new_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded study of any version, in the names of this one."""
    renamed = copy.deepcopy(dict(data))
    for _ in _rename(renamed):
        pass
    return renamed


def _rename(data: dict[str, Any]) -> Iterator[Renamed]:
    """Rename in place, and tell each name that was found."""
    if "strategy" in data:
        yield from _rename_strategy(data, "strategy", "strategy")
    fidelity = data.get("fidelity")
    if isinstance(fidelity, dict):
        for key, values in FIDELITY.items():
            old = fidelity.get(key)
            if isinstance(old, str) and old in values:
                fidelity[key] = values[old]
                yield Renamed(f"fidelity.{key}", old, values[old])


def _rename_strategy(parent: Any, position: Any, key: str) -> Iterator[Renamed]:
    """Rename in ``parent[position]``, a name or a section, and in the members of a portfolio."""
    section = parent[position]
    if isinstance(section, str) and section in STRATEGIES:
        parent[position] = STRATEGIES[section]
        yield Renamed(key, section, STRATEGIES[section])
    if not isinstance(section, dict):
        return
    name = section.get("name")
    if isinstance(name, str) and name in STRATEGIES:
        section["name"] = STRATEGIES[name]
        yield Renamed(f"{key}.name", name, STRATEGIES[name])
    for old, new in OPTIONS.items():
        if old in section:
            section[new] = section.pop(old)
            yield Renamed(f"{key}.{old}", old, new)
    members = section.get("members")
    if isinstance(members, list):
        for index in range(len(members)):
            yield from _rename_strategy(members, index, f"{key}.members.{index}")
