"""The winner evaluated on the search items again: differences are noise of the machine."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.workers.messages import Outcome, Task


class Repetition:
    """Evaluations of one trial that are recorded beside its own.

    Args:
        log: Holds the trial, and the results.
        task: The trial's own.
        times: How many evaluations there are to be, those with a result included; a trial that is
            not complete has none.

    Attributes:
        waiting: Numbers of those that have not begun.
    """

    def __init__(self, log: TrialLog, task: Task, times: int) -> None:
        self._log = log
        self._task = task
        wanted = times if log.records[int(task.id)].state == "complete" else 0
        self.waiting = deque(range(len(self._values()), wanted))

    def next_task(self) -> Task:
        """The next evaluation."""
        return replace(self._task, id=f"repeat {self.waiting.popleft()}")

    def owns(self, outcome: Outcome) -> bool:
        """Whether an outcome is of one of these evaluations."""
        return outcome.task.startswith("repeat ")

    def finish(self, outcome: Outcome) -> None:
        """Record an outcome."""
        values = None if outcome.measurement is None else dict(outcome.measurement.values)
        self._log.set_attr("repeats", [*self._values(), values])

    def _values(self) -> list[object]:
        return self._log.get_attr("repeats") or []
