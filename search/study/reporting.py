"""Announcement of finished trials, and the end of a study whose trials fail one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergesearch.merging import StudyFailedError
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.study.events import Event


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

    def announce(self, record: TrialRecord, done: int, total: int) -> None:
        """Announce a finished trial."""
        self._notify(Event("trial", record.kind, record, done, total))

    def count(self, record: TrialRecord) -> None:
        """Count failures in a row, of trials that were measured.

        Raises:
            StudyFailedError: If there are too many.
        """
        if record.same_as is not None:
            return  # says nothing about what works now
        failure = record.failure
        self._consecutive_failures = self._consecutive_failures + 1 if _is_broken(record) else 0
        if failure is not None and self._consecutive_failures >= self._max_consecutive_failures:
            raise StudyFailedError(
                f"{self._consecutive_failures} trials failed in a row, the last (trial "
                f"{record.number}) with {failure.message}\n{failure.detail}".rstrip()
            )


def check_anchors(records: Sequence[TrialRecord]) -> None:
    """Refuse to search where the base has failed, or every anchor and not only as infeasible.

    A search that has begun, by an earlier version, goes on.

    Raises:
        StudyFailedError: In one line, with the reason of the first failure.
    """
    if any(record.kind == "search" for record in records):
        return
    latest = {record.name: record for record in records if record.kind == "anchor"}
    failed = [record for record in latest.values() if record.state == "failed"]
    base = latest.get("base")
    if base is not None and base in failed:
        what = "the base could not be measured"
        failed = [base]
    elif len(failed) == len(latest) and any(_is_broken(record) for record in failed):
        what = f"no anchor could be measured, of {len(failed)}"
    else:
        return
    reason = " ".join(first_failure(failed).split())
    raise StudyFailedError(
        f"{what}: {reason}; nothing is searched before that is mended: run again with "
        "--retry-failed, or with a corrected study (`mergesearch show --failed` has the details)"
    )


def _is_broken(record: TrialRecord) -> bool:
    """Whether a trial has failed in a way that may mean a broken setting.

    An infeasible merge is an answer, with which the search goes on.
    """
    return record.failure is not None and record.failure.kind != "infeasible"


def first_failure(records: Sequence[TrialRecord]) -> str:
    """The message of the first trial that failed."""
    return next(
        (record.failure.message for record in records if record.failure is not None),
        "none recorded",
    )
