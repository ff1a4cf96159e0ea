"""Where trials run: one contract, two members.

``inline`` runs them in the driver's own process, with original tracebacks and no start-up. ``ray``
keeps workers on the cores and GPUs of a machine or cluster busy. Both members pass the contract in
``tests/contracts/test_backends.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.messages import Notice, Outcome, Task, WorkerSpec


class Backend(Protocol):
    """Runs tasks and hands outcomes back in finishing order."""

    @property
    def slots(self) -> int:
        """How many tasks to keep submitted at a time; may change."""

    def submit(self, task: Task) -> None:
        """Accept a task; returns at once."""

    def wait(self) -> list[Outcome]:
        """Block until a submitted task is finished or ``slots`` has grown.

        Returns:
            New outcomes; each is handed out once.
        """

    def close(self) -> None:
        """Stop all workers and release everything, whatever is in flight."""


def check_backend(section: WorkersSection, objects: Mapping[str, Any]) -> None:
    """Refuse what a program gave and workers cannot be sent, before any weight is read.

    Args:
        section: Which workers.
        objects: Name -> function or class.

    Raises:
        InputError: In one line.
    """
    if section.distributed:
        from mergesearch.search.workers.backends.cluster import check_objects

        check_objects(objects)


def open_backend(
    section: WorkersSection,
    spec: WorkerSpec,
    notify: Callable[[Notice], None] = lambda notice: None,
    wait_seconds: float = 300.0,
) -> Backend:
    """Start the workers that the study asks for.

    Args:
        section: How many, where, and what each takes.
        spec: What they are built from.
        notify: Called with messages on where workers are, how far they are with loading, and on
            those that are lost.
        wait_seconds: How long to wait until a worker of a cluster exists.

    Raises:
        InputError: If the cluster does not have what is asked for.
        StudyFailedError: If a worker cannot be built.
    """
    if section.distributed:
        from mergesearch.search.workers.backends.ray_pool import RayPool

        return RayPool(section, spec, notify, wait_seconds)
    from mergesearch.search.workers.backends.inline import Inline

    return Inline(spec, notify)
