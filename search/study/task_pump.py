"""The loop that keeps a backend busy: submit tasks, wait for results, record both."""

from __future__ import annotations

from collections.abc import Callable

from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.study.graceful_stop import GracefulStop
from mergesearch.search.workers.backends import Backend
from mergesearch.search.workers.messages import Outcome, Task


class TaskPump:
    """Feeds a backend.

    Args:
        backend: Where tasks run.
        log: The trial log; what a round records reaches the disk at once.
        graceful_stop: Asks for an end once running tasks have finished.
    """

    def __init__(self, backend: Backend, log: TrialLog, graceful_stop: GracefulStop) -> None:
        self._backend = backend
        self._log = log
        self._graceful_stop = graceful_stop

    def run(self, next_task: Callable[[], Task | None], finish: Callable[[Outcome], None]) -> None:
        """Keep the backend's slots full until there are no more tasks.

        Args:
            next_task: The next task, or None while there is none.
            finish: Called with each outcome, in finishing order.

        Raises:
            KeyboardInterrupt: When asked to stop, once the tasks in flight have finished.
        """
        in_flight = 0
        exhausted = False
        outcomes: list[Outcome] = []
        while True:
            # Results and the trials that are asked after them reach the disk at once; no work
            # begins before that.
            tasks: list[Task] = []
            with self._log.batched_writes():
                for outcome in outcomes:
                    in_flight -= 1
                    finish(outcome)
                while not self._graceful_stop.requested and in_flight < self._backend.slots:
                    task = next_task()
                    exhausted = task is None
                    if task is None:
                        break
                    tasks.append(task)
                    in_flight += 1
            for task in tasks:
                self._backend.submit(task)
            if not in_flight and self._graceful_stop.requested:
                raise KeyboardInterrupt
            if not in_flight and exhausted:
                return
            outcomes = self._backend.wait()
