"""The scores of a rebuilt merge beside those that were recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.evaluators import Split
from mergesearch.merging import InputError
from mergesearch.merging.export.content import Content
from mergesearch.search.plan.heads import used_heads
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.runs.agreement import Agreement
from mergesearch.search.runs.exported import Scoring, rescore, score_folder
from mergesearch.search.runs.opened import Run
from mergesearch.search.runs.replay.sources import ReplaySource
from mergesearch.search.spec.comparison import evaluation_digest, scored_alike
from mergesearch.search.spec.sections import StudySpec


@dataclass(frozen=True)
class ReplayedScores:
    """A rebuilt merge's scores.

    Attributes:
        split: The items.
        values: Objective -> value.
        agreement: How they compare with the record; None where they cannot be compared.
        reason: Why they cannot; empty where they can.
    """

    split: Split
    values: Mapping[str, float]
    agreement: Agreement | None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        compared = {} if self.agreement is None else vars(self.agreement)
        told = {"reason": self.reason} if self.reason else {}
        return {"split": self.split, "values": dict(self.values), **compared, **told}

    def line(self) -> str:
        """For people."""
        figures = "  ".join(f"{name} {value:.6g}" for name, value in self.values.items())
        return f"scored again on {self.split} items: {figures} ({self._verdict()})"

    def _verdict(self) -> str:
        if self.agreement is None:
            return f"not compared: {self.reason}"
        if self.agreement.identical:
            return "identical to the record"
        how = "as close to the record as allowed" if self.agreement.agrees else "DIFFERENT"
        return f"{how}; {self.agreement.reason}" if self.agreement.reason else how


def trial_of(run: Run, source: ReplaySource) -> TrialRecord:
    """The complete trial of a run that is the same merge.

    Raises:
        InputError: If there is none.
    """
    if source.record is not None:
        return source.record
    winner = None if run.verdict is None else run.verdict.winner
    same = [
        record
        for record in run.log.records
        if record.state == "complete" and record.recipe.digest == source.recipe.digest
    ]
    if not same:
        raise InputError(
            f"--study: expected a run with a complete trial of the merge of {source.path}, found "
            f"none in {run.folder.path}; give its study file to score without that record"
        )
    return next((record for record in same if record.number == winner), same[0])


def score_by_run(run: Run, record: TrialRecord, folder: Path, head: str | None) -> ReplayedScores:
    """Score a rebuilt merge as a run did, and compare with its record."""
    check_head(run.plan, head)
    again = rescore(run, record, folder, whole=head is not None)
    return ReplayedScores(again.split, dict(again.measurement.values), again.agreement)


def study_plan(spec: StudySpec) -> Plan:
    """The plan by which a merge is scored without a run.

    Raises:
        InputError: If the study is wrong, or its objectives are relative to models that no record
            has scores of.
    """
    plan = plan_study(spec)
    needed = sorted(plan.evaluator.references())
    if needed:
        raise InputError(
            f"--study: expected the folder of a run, since objectives are relative to "
            f"{', '.join(needed)}, whose scores a run records; received a study file"
        )
    return plan


def score_by_study(
    plan: Plan, source: ReplaySource, folder: Path, head: str | None
) -> ReplayedScores:
    """Score a rebuilt merge by a study, and compare with what its export recorded."""
    check_head(plan, head)
    content = source.content
    recorded = {} if content is None else content.scores
    split: Split = "test" if "test" in recorded or plan.evaluator.size("test") else "search"
    measured, _ = score_folder(
        plan,
        RunFolder(Path("runs") / plan.spec.name),
        source.recipe,
        folder,
        Scoring(split, {}, whole=head is not None),
    )
    values = dict(measured.values)
    reason = _incomparable(content, evaluation_digest(plan.spec), split)
    if reason:
        return ReplayedScores(split, values, None, reason)
    same = values == dict(recorded[split])
    told = "" if same else f"the export recorded {_told(recorded[split])}"
    return ReplayedScores(split, values, Agreement(same, same, told))


def check_head(plan: Plan, head: str | None) -> None:
    """Refuse to score a model with one head where items need others.

    Raises:
        InputError: In one line.
    """
    others = [] if head is None else sorted({*used_heads(plan.heads, plan.evaluator)} - {head})
    if others:
        raise InputError(
            f"--study: expected a model with the heads of all items, received one with that of "
            f"{head!r}, while items of {', '.join(others)} need theirs; leave --study out"
        )


def _told(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())


def _incomparable(content: Content | None, settings: str, split: Split) -> str:
    """Why scores cannot be compared with what an export recorded; empty where they can."""
    if content is None or split not in content.scores:
        return f"the recipe has no recorded scores on {split} items"
    if not scored_alike(content.settings, settings):
        return (
            f"the export recorded {_told(content.scores[split])} with other evaluators, places of "
            f"data or library versions ({content.settings}, now {settings})"
        )
    return ""
