"""The best search values of a study, as they were after each trial."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mergesearch.search.record.trial_record import TrialRecord

if TYPE_CHECKING:
    from mergesearch.evaluators import Objective


class BestSoFar:
    """The best search value of each objective, over complete trials that keep all bounds.

    Args:
        objectives: Names and directions.
        records: Trials of earlier sessions.
    """

    def __init__(
        self, objectives: Sequence[Objective], records: Iterable[TrialRecord] = ()
    ) -> None:
        self._best_of = {o.name: max if o.direction == "maximize" else min for o in objectives}
        self.values: dict[str, float] = {}
        for record in records:
            self.add(record)

    def add(self, record: TrialRecord) -> None:
        """Take a trial into account, unless it is incomplete or misses a bound."""
        if record.state != "complete" or not record.feasible:
            return
        for name in self._best_of.keys() & record.values.keys():
            value = record.values[name]
            self.values[name] = self._best_of[name](self.values.get(name, value), value)
