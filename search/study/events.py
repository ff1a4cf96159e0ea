"""What a running study announces to its observers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mergesearch.search.record.trial_record import Score, TrialRecord


@dataclass(frozen=True)
class Event:
    """Something a user may want to see.

    Attributes:
        kind: ``phase`` (a new phase began), ``trial`` (a trial ended), ``score`` (a re-evaluation
            ended), ``workers`` (where they are, started or lost), ``loading`` (how far workers are
            with what they need before their first trial), ``metrics`` (where they are served),
            ``judging`` (where people judge), ``warning``.
        text: Name of the phase or split, else a message.
        record: The trial that the event is about.
        done, total: Progress within the phase, or of what is loaded.
        score: Of a re-evaluation, what was measured; None where that failed.
        best: Objective -> the best search value so far, of complete trials that keep all bounds.
    """

    kind: str
    text: str
    record: TrialRecord | None = None
    done: int = 0
    total: int = 0
    score: Score | None = None
    best: Mapping[str, float] = field(default_factory=dict)
