"""The contracts for all that the packages add which pytest was asked to test.

pytest collects this file where ``--mergesearch-plugin PACKAGE`` is given. An evaluator is tested if
its section has an attribute ``example``: a section of a study file, without a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from mergesearch.evaluators.spec.evaluators import SECTIONS
from mergesearch.merging.extensions.entry_points import WORDS, Plugin, plugins_of
from mergesearch.search.testing.evaluators import EvaluatorContract
from mergesearch.search.testing.operators import OperatorContract
from mergesearch.search.testing.requested import PACKAGES
from mergesearch.search.testing.spaces import SpaceContract
from mergesearch.search.testing.strategies import StrategyContract

CONTRACTS: dict[str, type] = {
    "operators": OperatorContract,
    "strategies": StrategyContract,
    "spaces": SpaceContract,
    "evaluators": EvaluatorContract,
}


def _plain(package: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _wanted() -> set[str]:
    return {_plain(package) for package in PACKAGES}


def _members() -> Iterator[Plugin]:
    """What the packages add."""
    for kind in WORDS:
        for plugins in plugins_of(kind).values():
            yield from (plugin for plugin in plugins if _plain(plugin.package) in _wanted())


def _contract(plugin: Plugin) -> type:
    """The tests of a member."""
    facts: dict[str, Any] = {"name": plugin.name}
    if plugin.kind == "evaluators":
        example = getattr(SECTIONS[plugin.name], "example", None)
        facts["section"] = example
        if example is None:
            reason = f"{plugin} has no example"
            return pytest.mark.skip(reason=reason)(type("Contract", (EvaluatorContract,), facts))
    return type("Contract", (CONTRACTS[plugin.kind],), facts)


def _found() -> dict[str, type]:
    """Name of a class of tests -> the class."""
    return {f"Test_{plugin.kind}_{plugin.name}": _contract(plugin) for plugin in _members()}


globals().update(_found())


def test_the_packages_add_something() -> None:
    """A misspelt name would test nothing."""
    adding = {_plain(plugin.package) for plugin in _members()}
    assert adding == _wanted(), f"expected packages that add plug-ins, received {PACKAGES}"
