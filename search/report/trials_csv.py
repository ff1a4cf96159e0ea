"""The trials of a run as a table in CSV, for spreadsheets and frames."""

from __future__ import annotations

import csv
import io

from mergesearch.evaluators import SPLITS
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.coefficients import with_kept
from mergesearch.search.report.costs import PHASES
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.masking import without_secrets


def trials_csv(data: ReportData) -> str:
    """One line for each trial, with a header.

    Columns are the number, kind, name and state of a trial; value and standard error of each
    objective, on search items first; whether it keeps all bounds; seconds by phase; the mean
    coefficient of each direction; and why it failed. What was not measured is empty.
    """
    data = with_kept(data)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    names = [
        f"{'' if split == 'search' else f'{split} '}{objective.name}{kind}"
        for split in SPLITS
        for objective in data.objectives
        for kind in ("", " error")
    ]
    directions = () if data.kept is None else data.kept.directions
    writer.writerow(
        [
            *("trial", "kind", "name", "state"),
            *names,
            "feasible",
            *(f"{phase} seconds" for phase in PHASES),
            *(f"coefficient {name}" for name in directions),
            "failure",
        ]
    )
    for record in sorted(data.records, key=lambda record: record.number):
        writer.writerow(_row(data, record, len(directions)))
    return table.getvalue()


def _row(data: ReportData, record: TrialSummary, directions: int) -> list[object]:
    scores: list[object] = []
    for split in SPLITS:
        score = data.score(record, split)
        for objective in data.objectives:
            known = score is not None and objective.name in score.values
            scores.append(score.values[objective.name] if known and score is not None else "")
            scores.append(score.errors.get(objective.name, "") if score is not None else "")
    means = () if data.kept is None else data.kept.means.get(record.number, ())
    failure = "" if record.failure is None else without_secrets(record.failure.message)
    return [
        *(record.number, record.kind, record.name, record.state),
        *scores,
        record.feasible if record.state == "complete" else "",
        *(record.seconds.get(phase, "") for phase in PHASES),
        *(means or [""] * directions),
        failure,
    ]
