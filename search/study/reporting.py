"""Announcement of finished trials, and the end of a study whose trials fail one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergesearch.merging import StudyFailedError
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.study.events import Event
from mergesearch.search.workers.messages import Failure


class TrialReporter:
    """Announces finished trials and counts consecutive failures.

    Args:
        notify: Called with an event for each trial.
        max_consecutive_failures: Number of failures in a row that end the study.
    """

    def __init__(self, notify: Callable[[Event], None], max_consecutive_failures: int) -> None:
        self._notify = notify
        self._max_consecutive_failures = max_consecutive_failures
        self._consecutive_failures = 0

    def report(self, record: TrialRecord, failure: Failure | None, done: int, total: int) -> None:
        """Announce a finished trial.

        Raises:
            StudyFailedError: If too many trials have failed in a row.
        """
        self._notify(Event("trial", record.kind, record, done, total))
        # An infeasible merge is an answer (the search goes on); errors and lost workers may mean a
        # broken setting.
        broken = failure is not None and failure.kind != "infeasible"
        self._consecutive_failures = self._consecutive_failures + 1 if broken else 0
        if failure is not None and self._consecutive_failures >= self._max_consecutive_failures:
            raise StudyFailedError(
                f"{self._consecutive_failures} trials failed in a row, the last (trial "
                f"{record.number}) with {failure.message}\n{failure.detail}".rstrip()
            )


def first_failure(records: Sequence[TrialRecord]) -> str:
    """The message of the first trial that failed."""
    return next(
        (record.failure.message for record in records if record.failure is not None),
        "none recorded",
    )
