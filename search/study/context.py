"""What all phases of a study share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.record.trial_record import Kind, TrialRecord
from mergesearch.search.study.events import Event
from mergesearch.search.study.known_merges import KnownMerges
from mergesearch.search.study.reporting import TrialReporter
from mergesearch.search.study.task_pump import TaskPump


@dataclass(frozen=True)
class StudyContext:
    """The parts of a running study.

    Attributes:
        plan: The checked study.
        log: Its trial log.
        pump: Runs tasks.
        reporter: Announces finished trials.
        notify: Called with each event.
        known: The merges that have been measured.
    """

    plan: Plan
    log: TrialLog
    pump: TaskPump
    reporter: TrialReporter
    notify: Callable[[Event], None]
    known: KnownMerges

    def records(self, kind: Kind) -> list[TrialRecord]:
        """Recorded trials of a kind, by number."""
        return [record for record in self.log.records if record.kind == kind]
