"""Which trials the strategy knows before it begins, and which it is told while it searches.

A failed trial may be measured again (``mergesearch run --retry-failed``). The record keeps the
failure; the other attempt is a trial of its own that names it (``retry_of``). While no suggestion
was asked yet, a mended anchor is an anchor like any other. Later the strategy has been built
without it, and a replay must build it so again; it is then told the result as one of others, at its
place in the order of tells, as it is told those of other attempts.
"""

from __future__ import annotations

from collections.abc import Sequence

from mergesearch.search.record.trial_record import TrialRecord


def known_before_search(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Anchors and trials of other runs.

    Other attempts at anchors are left out that came after the strategy's first suggestion.
    """
    first = next((record.number for record in records if record.kind == "search"), len(records))
    return [
        record
        for record in records
        if record.kind == "taken"
        or (record.kind == "anchor" and (record.retry_of is None or record.number < first))
    ]


def trials_of_search(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Trials that the strategy suggested, and other attempts that it is told of, by number."""
    known = {record.number for record in known_before_search(records)}
    return [
        record
        for record in records
        if record.kind == "search" or (record.kind == "anchor" and record.number not in known)
    ]


def suggested(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Trials that the strategy suggested, by number."""
    return [r for r in records if r.kind == "search" and r.retry_of is None]


def tells_of(records: Sequence[TrialRecord]) -> int:
    """How many results the strategy has been told."""
    return sum(record.tell_index is not None for record in records)
