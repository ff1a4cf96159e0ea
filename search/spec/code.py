"""The code of others that a study uses: plug-ins, and objects of the user's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergesearch.evaluators.spec.evaluators import SECTIONS
from mergesearch.merging.extensions.entry_points import Plugin
from mergesearch.merging.extensions.references import given, known, source_digest
from mergesearch.merging.extensions.used_plugins import UsedPlugin
from mergesearch.merging.operators import OPERATORS
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.spec.study_file import references_of
from mergesearch.search.strategies.table import STRATEGIES
from mergesearch.spaces.spec import SPACE_KINDS


def used_plugins(spec: StudySpec) -> tuple[UsedPlugin, ...]:
    """The plug-ins that a study names."""
    return tuple(dict.fromkeys(UsedPlugin.of(plugin) for plugin in _plugins(spec)))


def _plugins(spec: StudySpec) -> Iterator[Plugin]:
    operator = spec.operator
    members = operator.options.get("members") or operator.options.get("among") or ()
    strategies = spec.strategy.options.get("members") or ()
    found = [
        *(OPERATORS.plugin(name) for name in _named([operator.name, *members])),
        *(STRATEGIES.plugin(name) for name in _named([spec.strategy.name, *strategies])),
        *(SECTIONS.plugin(evaluator.kind) for evaluator in spec.evaluators),
        None if spec.space.kind is None else SPACE_KINDS.plugin(spec.space.kind),
    ]
    yield from (plugin for plugin in found if plugin is not None)


def _named(members: Sequence[Any]) -> list[str]:
    """Names of members of a table, which sections have as such or under ``name``."""
    names = [each.get("name") if isinstance(each, Mapping) else each for each in members]
    return [name for name in names if isinstance(name, str)]


def code_revisions(spec: StudySpec) -> dict[str, str]:
    """What tells versions of that code apart, by what it is; functions are in the study itself."""
    revisions = {str(plugin): plugin.version for plugin in used_plugins(spec)}
    for key, name in references_of(spec).items():
        revisions[f"{key.partition('.')[0]} {name}"] = source_digest(known(name))
    return revisions


def given_objects(spec: StudySpec) -> dict[str, Any]:
    """The objects of a study that a program gave to this process, for its workers."""
    names = [spec.operator.name]
    for evaluator in spec.evaluators:
        names += getattr(evaluator, "references", ())
    return given(names)
