"""One worker in the driver's own process."""

from __future__ import annotations

from collections import deque

from mergesearch.search.workers.messages import Outcome, Task, WorkerSpec
from mergesearch.search.workers.worker import Worker


class Inline:
    """Runs each task when it is waited for.

    Exceptions while building the worker are the original ones.
    """

    slots = 1

    def __init__(self, spec: WorkerSpec) -> None:
        self._worker = Worker(spec)
        self._tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        """Queue the task."""
        self._tasks.append(task)

    def wait(self) -> list[Outcome]:
        """Run the oldest task."""
        return [self._worker.run(self._tasks.popleft())]

    def close(self) -> None:
        """Drop queued tasks."""
        self._tasks.clear()
