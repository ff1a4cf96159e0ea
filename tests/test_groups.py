"""Tests that share a dear fixture run in one process: what ``tests/conftest.py`` sees to."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.xdist_group("groups")


def test_the_scheduler_reads_the_group_of_a_test(request: pytest.FixtureRequest) -> None:
    """It takes it from the end of the id; without it every process would start every server."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("tests are not distributed by groups")
    assert request.node.nodeid.endswith("@groups")
    assert not request.node.nodeid.endswith("@groups@groups")
