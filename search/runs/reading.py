"""Reads what a run shows: from its report where one is written, else from its trial log."""

from __future__ import annotations

from pathlib import Path

from mergesearch.search.report.data import ReportData
from mergesearch.search.report.saved import saved_data


def read_run(path: Path) -> ReportData:
    """What a run shows, also while it runs.

    A run that ended or was stopped is read from its folder alone: base, experts, data and storage
    may be gone.

    Raises:
        RunFolderError: If there is no run in the folder.
        InputError: If a run that is under way is described by files that are gone.
    """
    saved = saved_data(path)
    if saved is not None:
        return saved
    # Opening the trial log plans the study, which imports much more.
    from mergesearch.search.runs.opened import open_run

    return open_run(path).report_data()
