"""What a study that begins at priors shares with the runs that they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mergesearch.evaluators import Split
from mergesearch.evaluators.by_item import ByItem
from mergesearch.evaluators.spec.evaluators import build_evaluator
from mergesearch.merging import Source
from mergesearch.search.plan.plan import Plan
from mergesearch.search.runs.opened import Run

#: Kinds of evaluators that score no items.
WITHOUT_ITEMS = frozenset({"distance"})
#: Items that made a run's winner what it is, and items that judge a study.
USED: tuple[Split, ...] = ("search", "validation")
JUDGES: tuple[Split, ...] = ("validation", "test")


def leakage_notes(plan: Plan, runs: Sequence[Run]) -> tuple[str, ...]:
    """One line for everything that a study shares with the runs, or that cannot be told."""
    ours, unknown = _identities(plan, JUDGES)
    notes: list[str] = []
    for run in runs:
        origin = f"start: priors from {run.folder.path.name}"
        theirs, unknown_there = _identities(run.plan, USED)
        notes += [f"{origin}, whose {line}" for line in _shared_items(theirs, ours)]
        kinds = sorted(unknown | unknown_there)
        if kinds:
            notes.append(
                f"{origin}: it cannot be told whether its items are validation or test items of "
                f"this study, because evaluators do not name their items ({', '.join(kinds)})"
            )
        models = _shared_models(plan, run.plan)
        if models:
            notes.append(f"{origin}, which merged models of this study: {', '.join(models)}")
        if run.plan.spec.start is not None:
            notes.append(f"{origin}, which began at another run, whose items were not compared")
    return tuple(notes)


def _identities(plan: Plan, splits: Sequence[Split]) -> tuple[dict[Split, set[str]], set[str]]:
    """Split -> hashes of its items, and the kinds of evaluators that do not tell theirs."""
    found: dict[Split, set[str]] = {split: set() for split in splits}
    unknown: set[str] = set()
    for section in plan.spec.evaluators:
        evaluator = build_evaluator([section], Path())
        if isinstance(evaluator, ByItem):
            for split in splits:
                found[split] |= evaluator.identities(split)
        elif section.kind not in WITHOUT_ITEMS:
            unknown.add(section.kind)
    return found, unknown


def _shared_items(theirs: Mapping[Split, set[str]], ours: Mapping[Split, set[str]]) -> list[str]:
    """A line for every split of theirs that shares items with one of ours."""
    counts = [(used, judge, len(theirs[used] & ours[judge])) for used in USED for judge in JUDGES]
    return [
        f"{used} items may be {judge} items of this study ({count} of the same content)"
        for used, judge, count in counts
        if count
    ]


def _shared_models(plan: Plan, other: Plan) -> list[str]:
    """Base and experts of a study that another one merged too, by content or by place."""
    theirs = (other.template.base, *other.template.experts)
    ours = (plan.template.base, *plan.template.experts)
    return [source.name for source in ours if any(_same(source, their) for their in theirs)]


def _same(one: Source, other: Source) -> bool:
    alike = bool(one.fingerprint) and one.fingerprint == other.fingerprint
    return alike or one.path == other.path
