"""What trials cost: which failed and why, and where the workers' time went."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.masking import without_secrets

#: Parts of a trial that are timed.
PHASES = ("merge", "evaluate", "descend", "overhead")


@dataclass(frozen=True)
class FailureGroup:
    """Trials that failed for the same reason.

    Attributes:
        kind: ``infeasible``, ``error`` or ``lost``.
        message: Message of the first of them.
        trials: Their numbers.
    """

    kind: str
    message: str
    trials: tuple[int, ...]


def failures(data: ReportData) -> list[FailureGroup]:
    """Failures by kind and message (numbers inside a message aside), most frequent first."""
    groups: dict[tuple[str, str], list[TrialSummary]] = {}
    for record in sorted(data.records, key=lambda r: r.number):
        if record.failure is not None:
            key = (record.failure.kind, re.sub(r"\d+", "#", record.failure.message))
            groups.setdefault(key, []).append(record)
    listed = [
        FailureGroup(
            kind, without_secrets(members[0].failure.message), tuple(r.number for r in members)
        )
        for (kind, _), members in groups.items()
        if members[0].failure is not None
    ]
    return sorted(listed, key=lambda group: -len(group.trials))


@dataclass(frozen=True)
class Timing:
    """Seconds of all trials in one phase, and its share of the sum of the phases."""

    phase: str
    seconds: float
    share: float


def timings(data: ReportData) -> list[Timing]:
    """Where the workers' time went: merge, evaluate, overhead, and descend with gradients."""
    sums = {
        phase: math.fsum(record.seconds.get(phase, 0.0) for record in data.records)
        for phase in PHASES
    }
    if not sums["descend"]:
        del sums["descend"]
    total = math.fsum(sums.values())
    return [
        Timing(phase, seconds, seconds / total if total else 0.0) for phase, seconds in sums.items()
    ]


@dataclass(frozen=True)
class Forecast:
    """What trials were expected to take once the anchors had been measured.

    Attributes:
        anchors: Number of anchors that tell.
        trials: Number of trials that it is for, anchors included.
        each: Phase -> seconds of a trial.
    """

    anchors: int
    trials: int
    each: Mapping[str, float]

    @property
    def seconds(self) -> dict[str, float]:
        """Phase -> seconds of all trials."""
        return {phase: self.trials * seconds for phase, seconds in self.each.items()}


def measured_trials(data: ReportData) -> list[TrialSummary]:
    """Finished trials that a worker has measured: neither known nor taken from other runs."""
    ended = (record for record in data.records if record.state != "running")
    return [record for record in ended if record.kind != "taken" and record.same_as is None]


def forecast(data: ReportData) -> Forecast | None:
    """What the finished trials were expected to take; None while nothing but anchors is finished.

    Trials whose scores the record had, or were taken from other runs, cost nothing.
    """
    timed = measured_trials(data)
    anchors = [r for r in timed if r.kind == "anchor" and r.state == "complete"]
    if not anchors or all(record.kind == "anchor" for record in timed):
        return None
    each = {t.phase: 0.0 for t in timings(data)}
    for phase in each:
        each[phase] = math.fsum(r.seconds.get(phase, 0.0) for r in anchors) / len(anchors)
    return Forecast(len(anchors), len(timed), each)


def busy_share(data: ReportData) -> float | None:
    """Share of the workers' time that went into trials; None where it is not recorded.

    A worker's time runs from the start of its first trial to the end of its last, so that breaks
    between sessions, after which workers are new processes, do not count as idling.
    """
    spans: dict[str, tuple[float, float]] = {}
    busy = 0.0
    for record in data.records:
        if record.worker and record.finished:
            spent = math.fsum(record.seconds.values())
            first, last = spans.get(record.worker, (math.inf, -math.inf))
            spans[record.worker] = (min(first, record.finished - spent), max(last, record.finished))
            busy += spent
    available = math.fsum(last - first for first, last in spans.values())
    return min(busy / available, 1.0) if available > 0 else None
