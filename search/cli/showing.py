"""Prints a run: its result table with the headline, or a list of trials."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergesearch.merging.foreign.shown import cut
from mergesearch.search.cli.options import emit
from mergesearch.search.grammar import counted
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.headline import sentences
from mergesearch.search.report.tables import text_lines
from mergesearch.search.report.writing import as_json as report_dict
from mergesearch.search.report.writing import trial_dict

STATES = ("complete", "partial", "failed", "running")


def print_run(data: ReportData, as_json: bool) -> None:
    """Print the report as JSON, or the result table and the headline."""
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
    states = [record.state for record in data.records]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    report = Path(data.run) / "report.html"
    closing = f"{counted(len(states), 'trial')} ({counts}); report: {report}"
    emit(None, False, lambda: [*lines, "", *sentences(data), closing])


def print_front(data: ReportData, as_json: bool) -> None:
    """Print the recommended front, and as text also who else is on the observed one."""
    estimates = {} if data.front_estimate is None else data.front_estimate.recommended
    recommended = {record.number for record in data.recommended}
    observed = {record.number for record in data.front}
    left = [record for record in data.front if record.number not in recommended]
    if as_json:
        marked = [
            as_dict(record)
            | {
                "observed_front": record.number in observed,
                "estimated": estimates.get(record.number),
            }
            for record in data.recommended
        ]
        emit(marked, True, list)
        return
    lines = [] if data.recommended else trial_lines([])
    for record in data.recommended:
        (line,) = trial_lines([record])
        listed = "  ".join(
            f"{key} {each:.4g}" for key, each in estimates.get(record.number, {}).items()
        )
        lines.append(f"{line}  estimated: {listed}" if listed else line)
    if left:
        lines += ["", "on the front by their own scores only:", *trial_lines(left)]
    emit(None, False, lambda: lines)


def as_dict(record: TrialSummary) -> dict[str, Any]:
    """A trial with the reason of its failure, for ``--json``."""
    return trial_dict(record) | {
        "failure": None if record.failure is None else vars(record.failure)
    }


def trial_lines(records: Sequence[TrialSummary]) -> list[str]:
    """One line for each trial: its values, or the reason of its failure."""
    lines = []
    for record in records:
        name = f"trial {record.number}" + (f" ({record.name})" if record.name else "")
        values = "  ".join(f"{key} {value:.4g}" for key, value in record.values.items())
        reason = (
            ""
            if record.failure is None
            else f"{record.failure.kind}: {cut(record.failure.message)}"
        )
        same = "" if record.same_as is None else f"  same merge as trial {record.same_as}"
        lines.append(f"{name}  {values}{reason}{same}")
    return lines or ["none"]
