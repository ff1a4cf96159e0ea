"""What to be careful about in a result: ties, bounds, trials that were stopped, noise, surprising
parents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mergesearch.search.record.trial_record import Score, TrialRecord
from mergesearch.search.report.summary import ReportData, label
from mergesearch.search.study.reference_scores import Z95, reference_mismatches


def caveats(data: ReportData) -> list[str]:
    """One line for each thing to say, most important first."""
    return [
        *_missed_bounds(data),
        *_ties(data),
        *_repeats(data),
        *_stopped(data),
        *reference_mismatches(
            data.records, data.objectives, data.resolved.get("reference_scores") or {}
        ),
        *data.warnings,
    ]


def ties(data: ReportData) -> list[TrialRecord]:
    """Contenders that the validation items do not tell from the winner: in every objective the
    difference is noise.
    """
    if data.verdict is None or data.winner is None:
        return []
    scores = data.verdict.scores.get("validation", {})
    ours = scores.get(data.winner.number)
    if ours is None:
        return []
    others = (
        number for number in scores if number != data.winner.number and scores[number].feasible
    )
    return [
        data.by_number[n]
        for n in others
        if all(_equal(ours, scores[n], o.name) for o in data.objectives)
    ]


def _missed_bounds(data: ReportData) -> list[str]:
    complete = [
        record for record in data.records if record.state == "complete" and record.violations
    ]
    if not complete:
        return []
    missed = sum(not record.feasible for record in complete)
    lines = [
        (
            f"{missed} of {len(complete)} complete trials miss a bound "
            f"({', '.join(complete[0].violations)})."
        )
    ]
    if data.winner is not None and data.verdict is not None:
        for split in ("validation", "test"):
            score = data.verdict.scores.get(split, {}).get(data.winner.number)
            names = (
                [name for name, value in score.violations.items() if value > 0]
                if score is not None
                else []
            )
            lines += [f"The winner misses {name!r} on {split} items." for name in names]
    return lines


def _ties(data: ReportData) -> list[str]:
    found = ties(data)
    if not found:
        return []
    named = ", ".join(label(record) for record in found[:8]) + (", ..." if len(found) > 8 else "")
    return [f"Ties within noise on validation items: {named}."]


def _equal(ours: Score, theirs: Score, name: str) -> bool:
    difference = ours.values[name] - theirs.values[name]
    return abs(difference) <= Z95 * _spread(ours, theirs, name) + 1e-12


def _spread(ours: Score, theirs: Score, name: str) -> float:
    """Standard error of a difference: paired where items explain the values."""
    one = ours.items.get(name)
    two = theirs.items.get(name)
    if one is not None and two is not None and len(one) == len(two) > 1:
        gaps = one - two
        if math.isclose(gaps.mean(), ours.values[name] - theirs.values[name], abs_tol=1e-5):
            return float(np.std(gaps, ddof=1) / math.sqrt(len(gaps)))
    return math.hypot(ours.errors.get(name, 0.0), theirs.errors.get(name, 0.0))


def _repeats(data: ReportData) -> list[str]:
    known = [values for values in data.repeats if values is not None]
    if data.winner is None or not known:
        return []
    moved = {
        o.name: max(abs(v[o.name] - data.winner.values[o.name]) for v in known)
        for o in data.objectives
    }
    if not any(moved.values()):
        return [f"Evaluated again, the winner scored the same to the bit ({len(known)} times)."]
    listed = ", ".join(f"{name} by {value:.2g}" for name, value in moved.items() if value)
    return [
        (
            f"Evaluated again on the same items, the winner's scores moved: {listed}. Smaller "
            "differences mean nothing."
        )
    ]


def _stopped(data: ReportData) -> list[str]:
    stopped = [record for record in data.records if record.stopped is not None]
    if not stopped:
        return []
    searched = [
        record for record in data.records if record.kind == "search" and record.state != "running"
    ]
    line = (
        f"{len(stopped)} of {len(searched)} search trials were stopped early; what strategies "
        "were told of them are "
    )
    share = _evaluated_share(data, searched)
    return [
        line
        + "estimates."
        + ("" if share is None else f" The search evaluated {share:.0%} of its items.")
    ]


def _evaluated_share(data: ReportData, searched: Sequence[TrialRecord]) -> float | None:
    if not data.search_items:
        return None
    evaluated = sum(data.search_items if r.evaluated is None else r.evaluated for r in searched)
    return evaluated / (data.search_items * len(searched))
