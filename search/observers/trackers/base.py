"""The tracker that every service shares, and what it needs of a service."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

from mergesearch.evaluators import Objective
from mergesearch.search.record.best_so_far import BestSoFar
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.study.events import Event

#: How a session of the study ended.
Status = Literal["finished", "failed", "interrupted"]


class Writer(Protocol):
    """A service; its methods may raise anything and take any time."""

    def write(self, scalars: Mapping[str, float], trial: int) -> None:
        """Send the numbers of one trial."""

    def close(self, status: Status) -> None:
        """Send what is left, and how the session ended."""


class Tracker:
    """Sends each trial to a writer: values, best so far, seconds by phase, counts of states.

    Args:
        id: Id of the service's run, with which a resumed study continues it.
        writer: The service.
        objectives: Names and directions.
        records: Trials of earlier sessions; they count for the best values and the counts.
    """

    def __init__(
        self,
        id: str,
        writer: Writer,
        objectives: Sequence[Objective],
        records: Iterable[TrialRecord] = (),
    ) -> None:
        past = list(records)
        self.id = id
        self._writer = writer
        self._best = BestSoFar(objectives, past)
        self._states = Counter[str](record.state for record in past if record.state != "running")

    def observe(self, event: Event) -> None:
        """Send a trial that ended; other events are not for trackers."""
        if event.kind == "trial" and event.record is not None:
            self._writer.write(self._scalars(event.record), event.record.number)

    def close(self, status: Status = "finished") -> None:
        """End the session."""
        self._writer.close(status)

    def _scalars(self, record: TrialRecord) -> dict[str, float]:
        self._best.add(record)
        self._states[record.state] += 1
        groups: dict[str, Mapping[str, float]] = {
            "value": record.values,
            "best": self._best.values,
            "seconds": record.seconds,
            "trials": self._states,
        }
        scalars = {
            f"{group}/{key}": float(value)
            for group, numbers in groups.items()
            for key, value in numbers.items()
        }
        return {key: value for key, value in scalars.items() if math.isfinite(value)}
