"""A run opened for reading: its trials, its winner, the data of its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergesearch.merging import RunFolderError
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.storage import read_storage
from mergesearch.search.record.study_attributes import study_attr
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.record.trial_record import TrialRecord, Verdict
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.preference import preferred
from mergesearch.search.report.saved import check_data
from mergesearch.search.runs.beginning import spec_of_beginning
from mergesearch.search.runs.deciding import with_recorded_choice
from mergesearch.search.runs.publishing import report_data
from mergesearch.search.runs.wiring import open_log, storage_location


@dataclass(frozen=True)
class Run:
    """A run opened for reading.

    Attributes:
        folder: Its folder.
        plan: The checked study.
        log: Its trial log.
    """

    folder: RunFolder
    plan: Plan
    log: TrialLog

    @property
    def verdict(self) -> Verdict | None:
        """The final choice, or None while the study is unfinished."""
        return self.log.results.verdict()

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
                    "trials and no winner yet; finish it with `mergesearch run`, or choose one "
                    "with --trial"
                )
            return self.log.records[verdict.winner]
        if not 0 <= number < len(self.log.records):
            raise RunFolderError(
                f"{self.folder.path}: expected a trial from 0 to {len(self.log.records) - 1}, "
                f"received {number}"
            )
        record = self.log.records[number]
        if record.lost:
            raise RunFolderError(
                f"{self.folder.path}: expected a trial whose record is whole, received trial "
                f"{number}, which a repair could not recover; `mergesearch run` asks it again"
            )
        return record

    def preferred(self, pairs: Sequence[str]) -> TrialRecord:
        """The member of the recommended front that suits ``NAME=WEIGHT`` pairs best.

        Values as estimated from all trials decide, and those on search items without estimates.

        Raises:
            InputError: If the pairs do not fit the objectives.
            RunFolderError: If no trial is complete.
        """
        return self.log.records[preferred(self.report_data(), pairs).number]

    def report_data(self) -> ReportData:
        """The data of the report and the result table.

        Raises:
            RunFolderError: If the record lacks what its final choice names.
        """
        data = report_data(self.folder, self.plan, self.log)
        check_data(data, str(self.folder.path))
        return data


def open_run(path: Path) -> Run:
    """Open a run for reading, beside a live driver or after it.

    Raises:
        RunFolderError: If there is no run in the folder.
    """
    folder = RunFolder(path)
    spec = folder.load()
    storage = read_storage(storage_location(spec, folder), trials=False)
    # Recipes are identified by the content that was measured, which the log knows.
    fingerprints = study_attr(storage, spec.name, "fingerprints") or ()
    plan = plan_study(spec_of_beginning(spec, spec, storage), fingerprints, folder.arenas)
    plan = with_recorded_choice(plan, storage, folder.arenas)
    plan = replace(plan, spec=spec)
    return Run(folder, plan, open_log(storage, plan, create=False))
