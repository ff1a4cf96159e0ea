"""The contracts that plug-ins must keep, as a plug-in of pytest.

A package tests what it adds in a file of its own::

    from mergesearch.testing import OperatorContract

    class TestMedian(OperatorContract):
        name = "median"

``pytest --mergesearch-plugin PACKAGE`` runs the contracts for everything that a package adds.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mergesearch.search.testing.evaluators import EvaluatorContract
    from mergesearch.search.testing.operators import OperatorContract
    from mergesearch.search.testing.spaces import SpaceContract
    from mergesearch.search.testing.strategies import StrategyContract

__all__ = ["EvaluatorContract", "OperatorContract", "SpaceContract", "StrategyContract"]

_ROOM = "mergesearch.search.testing"
_HOMES = {
    "EvaluatorContract": "evaluators",
    "OperatorContract": "operators",
    "SpaceContract": "spaces",
    "StrategyContract": "strategies",
}

pytest.register_assert_rewrite(_ROOM)


def __getattr__(name: str) -> Any:
    # pytest imports this module in every project of an environment: it must stay light.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{_ROOM}.{_HOMES[name]}"), name)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--mergesearch-plugin``."""
    parser.getgroup("mergesearch").addoption(
        "--mergesearch-plugin",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="run mergesearch's contracts for everything that PACKAGE adds; repeatable",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the tests of the packages that were asked for."""
    packages = config.getoption("--mergesearch-plugin")
    if not packages:
        return
    requested = importlib.import_module(f"{_ROOM}.requested")
    requested.PACKAGES[:] = packages
    config.args.append(str(Path(requested.__file__ or "").with_name("installed.py")))
