"""Where trials run: one contract, two members.

``inline`` is the real thing in one process: original tracebacks, no start-up. ``ray`` keeps workers
on the cores and GPUs of a machine or cluster busy. ``tests/contracts/test_backends.py`` runs both
through the contract.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.messages import Outcome, Task, WorkerSpec


class Backend(Protocol):
    """Runs tasks; hands outcomes back in finishing order."""

    @property
    def slots(self) -> int:
        """How many tasks to keep submitted at a time; may change."""

    def submit(self, task: Task) -> None:
        """Accept a task; returns at once."""

    def wait(self) -> list[Outcome]:
        """Block until a submitted task is finished, or ``slots`` has grown; each outcome is handed
        out once.
        """

    def close(self) -> None:
        """Stop all workers and release everything, whatever is in flight."""


def open_backend(
    section: WorkersSection,
    spec: WorkerSpec,
    notify: Callable[[str], None] = lambda text: None,
    patience: float = 300.0,
) -> Backend:
    """Start the workers that the study asks for.

    Args:
        section: How many, where, and what each takes.
        spec: What they are built from.
        notify: TrialResult where workers are placed, and what becomes of them.
        patience: Seconds to wait for workers of a cluster.

    Raises:
        InputError: If the cluster does not have what is asked for.
        StudyFailedError: If a worker cannot be built.
    """
    if section.distributed:
        from mergesearch.search.workers.backends.ray_pool import RayPool

        return RayPool(section, spec, notify, patience)
    from mergesearch.search.workers.backends.inline import Inline

    return Inline(spec)
