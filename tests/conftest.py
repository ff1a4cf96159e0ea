"""What every test shares: few threads, no hub, and one server of each kind for a session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cluster import Cluster
    from tests.postgres import Server

os.environ.setdefault("MERGESEARCH_CACHE", tempfile.mkdtemp(prefix="mergesearch-cache-"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tell pytest-xdist the groups of tests, which it cannot tell itself under pytest 9.2.

    It appends them to a private attribute that pytest no longer has, so that every process would
    start servers and build fixtures of its own (pytest-xdist, issue 1386).
    """
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        groups = sorted({str(mark.args[0]) for mark in item.iter_markers("xdist_group")})
        suffix = f"@{'_'.join(groups)}"
        if groups and not item.nodeid.endswith(suffix):
            item._id = type(item.id).parse(item.nodeid + suffix)


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Let studies of this process draw no PNG files, but for tests that take ``pictures``."""
    try:
        from tests.pictures import drawing
    except ModuleNotFoundError:  # `make gpu-check TIER=kernels` has no libraries for studies
        yield
        return
    with drawing(False):
        yield


@pytest.fixture
def pictures(_no_pictures: None) -> Iterator[None]:
    """PNG files beside the reports of the test's studies, as users have them."""
    from tests.pictures import drawing

    with drawing(True):
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server; tests take databases of their own (``postgres.database()``).

    Tests that use it belong to the group ``postgres`` (or ``ray``), so that one process has it.
    """
    from tests.postgres import serve

    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Ray cluster with one node; tests that use it belong to the group ``ray``.

    The node has two cores, and four GPUs that exist in name only.

    Ray reads its token once in a process: this process has the cluster's for the whole session.
    """
    from tests.cluster import running

    with running() as started, pytest.MonkeyPatch.context() as patch:
        for key, value in started.environment.items():
            if key.startswith("RAY_AUTH"):
                patch.setenv(key, value)
        started.start("head", 2, "--num-gpus=4")
        yield started
