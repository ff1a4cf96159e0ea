"""One worker in the driver's own process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mergesearch.merging import StudyFailedError
from mergesearch.search.workers.loading import Loading, LoadingReporter, describe_loading
from mergesearch.search.workers.messages import Notice, Outcome, Task, WorkerSpec
from mergesearch.search.workers.worker import Worker


class Inline:
    """Runs each task when it is waited for.

    Exceptions while building the worker are the original ones.

    Args:
        spec: What the worker is built from.
        notify: Called with messages on how far it is with loading.
    """

    slots = 1

    def __init__(
        self, spec: WorkerSpec, notify: Callable[[Notice], None] = lambda notice: None
    ) -> None:
        def send(loading: Loading) -> None:
            notify(Notice("loading", describe_loading(loading), loading.done, loading.total))

        self._on_device = spec.device != "cpu"
        self._worker = Worker(spec, LoadingReporter(send))
        self._tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        """Queue the task."""
        self._tasks.append(task)

    def wait(self) -> list[Outcome]:
        """Run the oldest task.

        Raises:
            StudyFailedError: If the device of this process has broken; the task has no result then.
        """
        outcome = self._worker.run(self._tasks.popleft())
        if outcome.device_broken and self._on_device and outcome.failure is not None:
            raise StudyFailedError(
                "workers: expected a device that works, received: "
                f"{outcome.failure.message}; no result is lost, the same command runs the trial "
                "again in a new process"
            )
        return [outcome]

    def close(self) -> None:
        """Drop queued tasks."""
        self._tasks.clear()
