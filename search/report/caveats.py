"""What to be careful about in a result: bounds, ties, noise, stopped trials, odd references."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mergesearch.evaluators import Split
from mergesearch.search.grammar import counted, times
from mergesearch.search.record.trial_record import Score, TrialSummary
from mergesearch.search.report.coefficients import heat_map
from mergesearch.search.report.data import ReportData, label
from mergesearch.search.report.simultaneous import deviation_of
from mergesearch.search.report.wording import first_of
from mergesearch.search.study.reference_scores import Z95, reference_mismatches

#: An expert hardly counts if none of its coefficients reaches this share of the largest.
IDLE_SHARE = 0.05


def caveats(data: ReportData) -> list[str]:
    """One line for each thing to say, most important first."""
    return [
        *_missed_bounds(data),
        *_ties(data),
        *_luckier(data),
        *_luckier_front(data),
        *_repeats(data),
        *_lent(data),
        *_stopped(data),
        *_idle_experts(data),
        *reference_mismatches(
            data.records, data.objectives, data.resolved.get("reference_scores") or {}
        ),
        *_devices(data),
        *data.warnings,
    ]


def ties(data: ReportData) -> list[TrialSummary]:
    """Contenders that validation items cannot tell from the winner in any objective."""
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


def _luckier_front(data: ReportData) -> list[str]:
    estimate = data.front_estimate
    if estimate is None or round(estimate.observed - estimate.estimated, 2) <= 0:
        return []
    line = (
        "By the scores that it was chosen for, the front covers a hypervolume of "
        f"{estimate.observed:.2f}; about {estimate.estimated:.2f}, as estimated from all trials "
        "around its members."
    )
    return [line]


def _missed_bounds(data: ReportData) -> list[str]:
    bounded = [
        record for record in data.records if record.state == "complete" and record.violations
    ]
    if not bounded:
        return []
    missed = sum(not record.feasible for record in bounded)
    verb = "misses" if missed == 1 else "miss"
    bounds = ", ".join(_bound(data, name) for name in bounded[0].violations)
    lines = [f"{missed} of {len(bounded)} complete trials {verb} a bound ({bounds})."]
    lines += _anchors_that_miss(data)
    if data.winner is None:
        return lines
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        score = data.score(data.winner, split)
        names = () if score is None else score.missed
        lines += [f"The winner misses {name!r} on {split} items." for name in names]
    return lines


def _bound(data: ReportData, name: str) -> str:
    """``harm at most base, tolerance 0.02 of harm``."""
    told = data.tolerances.get(name)
    return name if told is None else f"{name}, tolerance {told}"


def _anchors_that_miss(data: ReportData) -> list[str]:
    """Which anchors could not win because they miss a bound, and whether any could."""
    scores = data.anchor_scores
    missing = [number for number, score in scores.items() if not score.feasible]
    if not missing:
        return []
    named = first_of([label(data.by_number[number]) for number in missing])
    split = "validation" if data.verdict is not None else "search"
    if len(missing) < len(scores):
        return [f"Anchors that miss a bound on {split} items, and so are not the best: {named}."]
    assert data.best_anchor is not None
    least = label(data.best_anchor)
    what = f"the one that misses them least ({least}) counts as the best"
    return [f"No anchor keeps the bounds on {split} items; {what}."]


def _ties(data: ReportData) -> list[str]:
    tied = ties(data)
    if not tied:
        return []
    named = first_of([label(record) for record in tied])
    return [f"These trials cannot be told apart from the winner on validation items: {named}."]


def _luckier(data: ReportData) -> list[str]:
    """That another leader scored better on validation items, where one did."""
    if data.verdict is None or data.winner is None:
        return []
    scores = data.verdict.scores.get("validation", {})
    kept = {number: score for number, score in scores.items() if score.feasible}
    if data.winner.number not in kept:
        return []
    losses = {number: data.complete.scalarise(score) for number, score in kept.items()}
    best = min(losses, key=lambda number: losses[number])
    if losses[best] >= losses[data.winner.number]:
        return []
    name = label(data.by_number[best]).capitalize()
    expected = "given what the search found around both, the winner is expected to be better"
    return [f"{name} scored better on validation items; {expected}."]


def _equal(ours: Score, theirs: Score, name: str) -> bool:
    difference = ours.values[name] - theirs.values[name]
    return abs(difference) <= Z95 * _spread(ours, theirs, name) + 1e-12


def _spread(ours: Score, theirs: Score, name: str) -> float:
    """Standard error of a difference: paired where items or resamples explain the values."""
    first = ours.items.get(name)
    second = theirs.items.get(name)
    if first is not None and second is not None and len(first) == len(second) > 1:
        gaps = first - second
        if math.isclose(gaps.mean(), ours.values[name] - theirs.values[name], abs_tol=1e-5):
            return float(np.std(gaps, ddof=1) / math.sqrt(len(gaps)))
    deviation = deviation_of(name, ours, theirs)
    if deviation is not None:
        return deviation.error
    return math.hypot(ours.errors.get(name, 0.0), theirs.errors.get(name, 0.0))


def _repeats(data: ReportData) -> list[str]:
    known = [values for values in data.repeats if values is not None]
    if data.winner is None or not known:
        return []
    moved = {
        o.name: max(abs(values[o.name] - data.winner.values[o.name]) for values in known)
        for o in data.objectives
    }
    if not any(moved.values()):
        again = "again" if len(known) == 1 else f"{times(len(known))} more"
        return [f"Evaluated {again}, the winner scored the same to the bit."]
    listed = ", ".join(f"{name} by {value:.2g}" for name, value in moved.items() if value)
    line = f"Evaluated again on the same items, the winner's scores moved: {listed}."
    return [f"{line} Differences smaller than this are noise."]


def _lent(data: ReportData) -> list[str]:
    """That the search used validation items, where it did."""
    lend = (data.resolved.get("selection") or {}).get("lend")
    if not lend:
        return []
    return [
        f"The search used {lend:.0%} of the files' validation items; the others chose the winner."
    ]


def _stopped(data: ReportData) -> list[str]:
    stopped = [record for record in data.records if record.stopped is not None]
    if not stopped:
        return []
    searched = [
        record for record in data.records if record.kind == "search" and record.state != "running"
    ]
    verb = "was" if len(stopped) == 1 else "were"
    line = (
        f"{len(stopped)} of {len(searched)} search trials {verb} stopped early; the strategy was "
        "given estimates of their scores."
    )
    share = _evaluated_share(data, searched)
    return [line if share is None else f"{line} The search evaluated {share:.0%} of its items."]


def _idle_experts(data: ReportData) -> list[str]:
    """Experts that hardly count in the leading trial, if any do."""
    table = heat_map(data)
    if table is None or table.rows != tuple(data.experts):
        return []
    sizes = np.abs(table.values).max(axis=1)
    idle = [
        name
        for name, size in zip(table.rows, sizes, strict=True)
        if size < IDLE_SHARE * sizes.max()
    ]
    if not idle:
        return []
    return [
        f"{counted(len(idle), 'expert')} of {len(table.rows)} hardly count in trial {table.trial} "
        f"(coefficients below {IDLE_SHARE:.0%} of the largest in every block): {first_of(idle)}."
        if len(idle) > 1
        else f"Expert {idle[0]} hardly counts in trial {table.trial} (coefficients below "
        f"{IDLE_SHARE:.0%} of the largest in every block)."
    ]


def _devices(data: ReportData) -> list[str]:
    """Cards that broke, and trials whose batches had to be smaller than the study says."""
    lines = [
        f"Set aside after device errors; its trials ran elsewhere: {card}."
        for card in data.set_aside
    ]
    sizes = [record.batch_size for record in data.records if record.batch_size is not None]
    if sizes:
        trials = counted(len(sizes), "trial")
        batches = ", ".join(str(size) for size in sorted(set(sizes)))
        lines.append(
            f"Memory ran out: {trials} ran with smaller batches than the study says ({batches})."
        )
    return lines


def _evaluated_share(data: ReportData, searched: Sequence[TrialSummary]) -> float | None:
    if not data.search_items:
        return None
    evaluated = sum(data.search_items if r.evaluated is None else r.evaluated for r in searched)
    return evaluated / (data.search_items * len(searched))
