"""Prints a run: its result table with the headline, or a list of trials."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mergesearch.search.cli.options import emit
from mergesearch.search.grammar import counted
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.report.headline import sentences
from mergesearch.search.report.tables import text_lines
from mergesearch.search.report.writing import as_json as report_dict
from mergesearch.search.runs.opened import Run

STATES = ("complete", "partial", "failed", "running")


def print_run(opened: Run, as_json: bool) -> None:
    """Print the report as JSON, or the result table and the headline."""
    data = opened.report_data()
    if as_json:
        emit(report_dict(data), True, list)
        return
    lines: list[str] = []
    if sys.stdout.isatty():
        from rich.console import Console

        from mergesearch.search.report.tables import rich_table

        Console().print(rich_table(data))
    else:
        lines = text_lines(data)
    states = [record.state for record in opened.log.records]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    report = opened.folder.path / "report.html"
    closing = f"{counted(len(states), 'trial')} ({counts}); report: {report}"
    emit(None, False, lambda: [*lines, "", *sentences(data), closing])


def trial_lines(records: Sequence[TrialRecord]) -> list[str]:
    """One line for each trial: its values, or the reason of its failure."""
    lines = []
    for record in records:
        name = f"trial {record.number}" + (f" ({record.name})" if record.name else "")
        values = "  ".join(f"{key} {value:.4g}" for key, value in record.values.items())
        reason = (
            "" if record.failure is None else f"{record.failure.kind}: {record.failure.message}"
        )
        lines.append(f"{name}  {values}{reason}")
    return lines or ["none"]
