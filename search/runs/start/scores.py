"""Scores of other runs (``start: {scores: [...]}``): results that a study need not ask for.

A run of the same models, scored in the same way, gives its complete trials to another study, with
another strategy, space or budget. They enter the log as trials of the kind ``taken`` before the
first anchor, so that a resumed study needs the other run no more. Strategies know them from the
beginning as they know anchors; they compete for the win, and cost nothing of the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergesearch.evaluators import Measurement
from mergesearch.merging import InputError, MergesearchError, Recipe, RunFolderError, Source
from mergesearch.search.grammar import counted
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.run_folder import environment
from mergesearch.search.record.study_attributes import MENDED, TAKEN
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.spec.comparison import (
    differences,
    evaluation_digest,
    listed,
    scored_alike,
)
from mergesearch.search.strategies.base import Point
from mergesearch.search.study.asking import ask_taken
from mergesearch.search.workers.messages import Outcome

#: Forms of rows that change scores.
APPROXIMATE = frozenset({"int8", "bf16"})


@dataclass(frozen=True, eq=False)
class TakenTrial:
    """A complete trial of another run, as this study holds it.

    Attributes:
        name: Its number, and the run.
        digest: Of the merge.
        point: Position in this study's space, float64 ``(dim,)``.
        record: The trial there.
    """

    name: str
    digest: str
    point: Point
    record: TrialRecord


@dataclass(frozen=True, eq=False)
class FoundScores:
    """What other runs have for a study.

    Attributes:
        trials: Those that its space holds, each merge once, run by run.
        notes: How many each run gave, one line each.
    """

    trials: tuple[TakenTrial, ...]
    notes: tuple[str, ...]


def find_scores(plan: Plan, folders: Sequence[str]) -> FoundScores:
    """The trials that other runs have for this study, without those that are its anchors.

    Raises:
        InputError: If a run is missing, has other models, or was scored in another way.
    """
    known = {anchor.recipe.digest for anchor in plan.anchors}
    trials: list[TakenTrial] = []
    notes: list[str] = []
    for folder in folders:
        run = _opened(folder)
        _check_models(plan, run, folder)
        _check_scored_alike(plan, run, folder)
        complete = [record for record in run.log.records if record.state == "complete"]
        found = list(_held(plan, run, complete, known))
        trials += found
        notes.append(_note(Path(folder).name, len(found), len(complete) - len(found)))
    return FoundScores(tuple(trials), tuple(notes))


def _note(name: str, taken: int, left: int) -> str:
    """How many trials a run gave, and how many it has beside these."""
    line = f"start: {counted(taken, 'trial')} taken over from {name}, at no cost of the budget"
    if not left:
        return line
    return f"{line}; {left} left out, known already or not held by this space"


def take_scores(plan: Plan, log: TrialLog, folders: Sequence[str]) -> tuple[str, ...]:
    """Record the trials that other runs have for this study, once; how many each run gave.

    An interrupted call is completed by the next one.

    Raises:
        InputError: As :func:`find_scores`.
        RunFolderError: If the other runs changed since some of their trials were recorded.
    """
    noted: list[str] | None = log.get_attr(TAKEN)
    if noted is not None:
        return tuple(noted)
    found = find_scores(plan, folders)
    recorded = [record for record in log.records if record.kind == "taken"]
    begun = [(record.name, record.recipe.digest) for record in recorded]
    if begun != [(one.name, one.digest) for one in found.trials[: len(recorded)]]:
        raise RunFolderError(
            "start.scores: expected the trials that this run began to take over, found others; "
            "restore the other runs, or choose another --run"
        )
    with log.batched_writes():
        for place, one in enumerate(found.trials):
            record = recorded[place] if place < len(recorded) else _ask(plan, log, one)
            if record.state == "running":
                log.tell(record.number, _outcome(record, one.record), None)
    log.set_attr(TAKEN, list(found.notes))
    return found.notes


def _ask(plan: Plan, log: TrialLog, one: TakenTrial) -> TrialRecord:
    return ask_taken(plan, log, one.name, one.point)


def _outcome(record: TrialRecord, theirs: TrialRecord) -> Outcome:
    """The result that is recorded here: values as they were measured there, without any time."""
    measured = Measurement(
        dict(theirs.values), dict(theirs.errors), dict(theirs.items), violations=theirs.violations
    )
    return Outcome(str(record.number), measured, None, batch_size=theirs.batch_size)


def _opened(folder: str) -> Run:
    try:
        return open_run(Path(folder))
    except MergesearchError as error:
        raise InputError(f"start.scores: {error}") from None


def _held(
    plan: Plan, run: Run, records: Sequence[TrialRecord], known: set[str]
) -> Iterator[TakenTrial]:
    """Trials whose merges the space holds; ``known`` gains the digests of these merges."""
    for record in records:
        recipe = _with_sources_of(plan.template, record.recipe)
        point = plan.point_of(recipe)
        if point is None:
            continue
        digest = plan.space.decode(point).digest
        if digest not in known and digest == recipe.digest:
            known.add(digest)
            name = f"trial {record.number} of {run.folder.path.name}"
            yield TakenTrial(name, digest, point, record)


def _with_sources_of(template: Recipe, recipe: Recipe) -> Recipe:
    """A recipe on the same models, named and placed as this study has them."""
    return replace(recipe, base=template.base, experts=template.experts, layout=template.layout)


def _check_models(plan: Plan, run: Run, folder: str) -> None:
    """Refuse a run on other base, experts or layout.

    Raises:
        InputError: In one line.
    """
    ours = (plan.template.base, *plan.template.experts)
    theirs = (run.plan.template.base, *run.plan.template.experts)
    alike = len(ours) == len(theirs) and all(map(_same, ours, theirs))
    special = plan.template.special == run.plan.template.special
    if alike and special and plan.template.layout == run.plan.template.layout:
        return
    other = next((o.name for o, t in zip(ours, theirs, strict=False) if not _same(o, t)), None)
    what = "special tensors" if alike else f"{other or 'another number of experts'}"
    raise InputError(
        f"start.scores: {folder}: expected a run on the same base and experts, in this order, "
        f"received one that differs in {what}; leave it out, or begin at its winner with start.run"
    )


def _same(one: Source, other: Source) -> bool:
    """Whether two sources hold the same weights; by place where their content is not known yet."""
    if one.fingerprint and other.fingerprint:
        return one.fingerprint == other.fingerprint
    return one.path == other.path


def _check_scored_alike(plan: Plan, run: Run, folder: str) -> None:
    """Refuse a run whose scores say something else of the same merge.

    Raises:
        InputError: In one line.
    """
    changed = _changes_of_scores(plan, run)
    if changed:
        raise InputError(
            f"start.scores: {folder}: expected a run that is scored as this study, received one "
            f"that differs in {listed(changed)}; leave it out, or begin at its winner with "
            "start.run, which needs no scores"
        )


def _changes_of_scores(plan: Plan, run: Run) -> list[str]:
    """What scores depend on and differs, as ``key: there -> here``."""
    ours = plan.spec
    theirs = run.plan.spec
    changed = []
    if not scored_alike(evaluation_digest(ours), evaluation_digest(theirs)):
        parts = [
            {"evaluators": spec.to_dict()["evaluators"], "selection": {"lend": spec.selection.lend}}
            for spec in (theirs, ours)
        ]
        changed += differences(*parts) or ["versions of plug-ins"]
    if ours.rows != theirs.rows and {ours.rows, theirs.rows} & APPROXIMATE:
        changed.append(f"rows: {theirs.rows} -> {ours.rows}")
    there = run.folder.environment().get("packages") or {}
    here = environment()["packages"]
    changed += [
        f"{name}: {there[name]} -> {here.get(name)}"
        for name in ("torch", "transformers")
        if name in there and there[name] != here.get(name)
    ]
    mended = run.log.get_attr(MENDED)
    return [*changed, *(["code of scorers, within that run"] if mended else [])]
