"""opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging import RunFolderError
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.storage import read_storage
from mergesearch.search.record.trial_log import TrialLog, study_note
from mergesearch.search.record.trial_record import TrialRecord, Verdict
from mergesearch.search.report.writing import ReportData, trial_dict
from mergesearch.search.retry import RetryPolicy
from mergesearch.search.spec.comparison import evaluation_digest
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.study.budget import busy_seconds
from mergesearch.search.study.problem import study_normaliser
from mergesearch.search.study.selection import parse_preference, preferred
from mergesearch.search.workers.messages import NODE_CACHE, WorkerSpec

if TYPE_CHECKING:
    from mergesearch.search.record.storage import Storage


@dataclass(frozen=True)
class Run:
    """A run opened for reading."""

    folder: RunFolder
    plan: Plan
    log: TrialLog

    @property
    def verdict(self) -> Verdict | None:
        """The final choice, or None while the study is unfinished."""
        return self.log.verdict()

    def trial(self, number: int | None) -> TrialRecord:
        """A trial by number; None means the winner.

        Raises:
            RunFolderError: If there is no such trial, or no winner yet.
        """
        if number is None:
            verdict = self.verdict
            if verdict is None:
                raise RunFolderError(
                    f"{self.folder.path}: expected a finished study, found {len(self.log.records)} "
                    "trials and no "
                    "winner yet; finish it with `mergesearch run`, or choose one with --trial"
                )
            return self.log.records[verdict.winner]
        if not 0 <= number < len(self.log.records):
            raise RunFolderError(
                f"{self.folder.path}: expected a trial from 0 to {len(self.log.records) - 1}, "
                f"received {number}"
            )
        return self.log.records[number]

    def preferred(self, pairs: Sequence[str]) -> TrialRecord:
        """The member of the front that suits ``NAME=WEIGHT`` pairs best, by its values on the
        search items.

        Raises:
            InputError: If the pairs do not fit the objectives.
            RunFolderError: If no trial is complete.
        """
        preference = parse_preference(pairs, self.plan.objectives)
        normaliser = study_normaliser(self.plan, self.log.records)
        found = preferred(self.log.records, self.plan.objectives, preference, normaliser)
        if found is None:
            raise RunFolderError(f"{self.folder.path}: expected a complete trial, found none")
        return found

    def report_data(self) -> ReportData:
        """What the report and the result table are made of."""
        return report_data(self.folder, self.plan, self.log)


def storage_location(spec: StudySpec, folder: RunFolder) -> str | Path:
    """Where the trial log is: the study's storage URL, or the journal in the run folder.

    ``${NAME}`` in the URL is filled in from the environment here, and only here, so that a password
    never reaches the run folder.
    """
    return os.path.expandvars(spec.storage) if spec.storage else folder.journal


def open_run(path: Path) -> Run:
    """Open a run for reading, beside a live driver or after it.

    Raises:
        RunFolderError: If there is no run in the folder.
    """
    folder = RunFolder(path)
    spec = folder.load()
    storage = read_storage(storage_location(spec, folder))

    # Recipes are identified by the content that was measured, which the log knows.
    plan = plan_study(spec, study_note(storage, spec.name, "fingerprints") or (), folder.arenas)
    return Run(folder, plan, _open_log(storage, plan, create=False))


def worker_spec(plan: Plan, folder: RunFolder) -> WorkerSpec:
    """What workers of this study are built from."""
    section = plan.spec.workers
    return WorkerSpec(
        template=plan.template,
        evaluators=tuple(evaluator.model_dump(mode="json") for evaluator in plan.spec.evaluators),
        arenas=section.cache or str(folder.arenas if section.address is None else NODE_CACHE),
        threads=section.threads,
        device="cuda" if section.gpus else "cpu",
        shards=max(int(section.gpus), 1),
        space=plan.differentiable_space,
    )


def report_data(folder: RunFolder, plan: Plan, log: TrialLog) -> ReportData:
    """The plain things that a report is made of."""
    verdict = log.verdict()
    workers: dict[str, int] = {}
    for record in log.records:
        if record.worker:
            workers[record.worker] = workers.get(record.worker, 0) + 1
    tested = {} if verdict is None else verdict.scores.get("test", {})
    return ReportData(
        study=plan.spec.name,
        run=str(folder.path),
        objectives=plan.objectives,
        weights=plan.weights.tolist(),
        records=log.records,
        verdict=verdict,
        layout=plan.layout,
        experts=tuple(expert.name for expert in plan.template.experts),
        names=plan.space.names,
        lower=plan.space.lower,
        upper=plan.space.upper,
        resolved=plan.spec.to_dict(),
        fingerprint=folder.environment() | {"evaluation settings": evaluation_digest(plan.spec)},
        wall_seconds=busy_seconds(log.records),
        trials_per_worker=workers,
        scale=study_normaliser(plan, log.records)
        if any(r.kind == "anchor" for r in log.records)
        else None,
        items={number: score.items for number, score in tested.items()},
        transductive=plan.evaluator.transductive,
        repeats=log.get_attr("repeats") or (),
        search_items=plan.evaluator.size("search"),
        warnings=tuple(log.get_attr("warnings") or ()),
    )


def _open_log(
    storage: Storage,
    plan: Plan,
    *,
    create: bool = True,
    patience: RetryPolicy | None = None,
    guard: Callable[[], None] = lambda: None,
) -> TrialLog:
    space = plan.space
    return TrialLog(
        storage,
        plan.spec.name,
        plan.objectives,
        space.decode,
        plan.template,
        keep_fields=plan.entry.space == "mixed",
        create=create,
        patience=patience,
        guard=guard,
    )


def as_dict(record: TrialRecord) -> dict[str, Any]:
    """A trial with the reason of its failure, for ``--json``."""
    return trial_dict(record) | {
        "failure": None if record.failure is None else vars(record.failure)
    }
