"""A head that is busy is asked again, one that refuses is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mergesearch.merging import InputError
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends import cluster

BUSY = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")


class RayError(Exception):
    """Ray's own."""


class Starting:
    """A Ray whose first starts fail; the real one fails only on a machine that is busy enough."""

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.starts = 0

    def init(self, **_options: Any) -> None:
        self.starts += 1
        if self.errors:
            raise self.errors.pop(0)

    def is_initialized(self) -> bool:
        return False

    def shutdown(self) -> None:
        """Nothing is left."""


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Any:
    def connected(ray: Starting, address: str | None = "auto") -> Any:
        monkeypatch.setattr(cluster, "import_ray", lambda: ray)
        monkeypatch.setattr(cluster, "PAUSE_SECONDS", 0.0)
        return cluster.connect(WorkersSection(backend="ray", address=address))

    return connected


@pytest.mark.parametrize("error", [BUSY, RuntimeError("Failed to get node info"), RayError("late")])
def test_a_head_that_does_not_answer_in_time_is_asked_again(connect: Any, error: Exception) -> None:
    ray = Starting(*[error] * (cluster.ATTEMPTS - 1))
    assert connect(ray) is ray
    assert ray.starts == cluster.ATTEMPTS
    with pytest.raises(InputError, match=r"workers\.address: expected auto to answer, received"):
        connect(Starting(*[error] * cluster.ATTEMPTS))


def refused() -> Exception:
    """As Ray raises it: the reason stands behind the error."""
    error = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    error.__cause__ = RuntimeError("Failed to connect to GCS: Unauthenticated: InvalidAuthToken")
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (refused(), "no or a wrong token"),
        (RuntimeError("Version mismatch: the cluster has Ray 2.0"), "Version mismatch"),
        (ValueError("no such address"), "no such address"),
    ],
)
def test_one_that_refuses_is_asked_once(connect: Any, error: Exception, told: str) -> None:
    ray = Starting(error)
    with pytest.raises(InputError, match=told):
        connect(ray)
    assert ray.starts == 1


def test_a_local_ray_is_started_once(connect: Any) -> None:
    ray = Starting(BUSY)
    with pytest.raises(InputError, match="a local Ray"):
        connect(ray, None)
    assert ray.starts == 1
