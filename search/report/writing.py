"""Writes the report of a study: one page, its pictures, and the numbers behind both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.merging import RunFolderError
from mergesearch.merging.checkpoints.atomic import write_atomically
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.caveats import caveats, ties
from mergesearch.search.report.coefficients import heat_map, with_kept
from mergesearch.search.report.comparison import compare, trade_off
from mergesearch.search.report.costs import busy_share, failures, forecast, timings
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.gains import anchor_intervals, gains
from mergesearch.search.report.headline import export_command, headline
from mergesearch.search.report.masking import without_secrets
from mergesearch.search.report.progress import progress
from mergesearch.search.report.saved import FILE, saved_text
from mergesearch.search.report.tables import Row, result_table
from mergesearch.search.report.trials_table import trials_csv

__all__ = ["ReportData", "as_json", "write_report"]

#: Every file that a report may have; those that no longer apply are removed.
FILES = (
    *("report.html", "report.json", "trials.csv"),
    *("best_so_far.png", "front.png", "coefficients.png"),
    FILE,
)


def write_report(data: ReportData, folder: Path) -> None:
    """Write ``report.html``, ``report.json``, ``trials.csv`` and the pictures into ``folder``.

    ``front.png`` needs two objectives or more; no picture is drawn before the first complete trial.
    Files appear whole or not at all: each is written under a temporary name, then renamed.

    Raises:
        RunFolderError: If the folder cannot be written.
    """
    from mergesearch.search.report.page.html_page import render
    from mergesearch.search.report.png_plots import draw_all

    data = with_kept(data)
    contents = {
        **draw_all(data),
        "report.json": (
            json.dumps(as_json(data), indent=1, allow_nan=False, default=str) + "\n"
        ).encode(),
        "trials.csv": trials_csv(data).encode(),
        "report.html": render(data).encode(),
        # Last: who finds it need not look at anything else.
        FILE: saved_text(data).encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(folder / name, content)
        for name in set(FILES) - set(contents):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{folder}: expected a folder that can be written, received: {error}"
        ) from None


def as_json(data: ReportData) -> dict[str, Any]:
    """All tables and curves of a report as JSON-able numbers; what is not finite becomes null."""
    normaliser = data.complete.normaliser
    intervals = anchor_intervals(data)
    content = {
        "study": data.study,
        "run": data.run,
        "finished": data.verdict is not None,
        "objectives": [
            {"name": objective.name, "direction": objective.direction, "weight": float(weight)}
            for objective, weight in zip(data.objectives, data.weights, strict=True)
        ],
        "winner": None if data.winner is None else data.winner.number,
        "leading": None if data.leading is None else data.leading.number,
        "best_anchor": None if data.best_anchor is None else data.best_anchor.number,
        "headline": headline(data),
        "trade_off": _trade_off(data),
        "comparison": [asdict(comparison) for comparison in compare(data)],
        "against_anchors": [asdict(each) | {"verdict": each.verdict} for each in intervals],
        "gains": [asdict(gain) for gain in gains(data, intervals)],
        "result": [_row(row) for row in result_table(data)],
        "front": _numbers(data, data.recommended),
        "front_observed": _numbers(data, data.front),
        "front_estimate": None if data.front_estimate is None else asdict(data.front_estimate),
        "trials": [
            trial_dict(record) for record in sorted(data.records, key=lambda record: record.number)
        ],
        "progress": _progress(data),
        "coefficients": _coefficients(data),
        "seconds": {t.phase: {"sum": t.seconds, "share": t.share} for t in timings(data)},
        "wall_seconds": data.wall_seconds,
        "trials_per_worker": dict(data.trials_per_worker),
        "busy_share": busy_share(data),
        "ties": [record.number for record in ties(data)],
        "repeats": list(data.repeats),
        "doubts": caveats(data),
        "failures": [asdict(group) for group in failures(data)],
        "normaliser": None if normaliser is None else normaliser.to_dict(),
        "space": {"names": list(data.names), "lower": list(data.lower), "upper": list(data.upper)},
        "untouched": data.untouched,
        "lineages": list(data.lineages),
        "predicted_seconds": dict(data.predicted_seconds),
        "predicted_trials": None if (told := forecast(data)) is None else asdict(told),
        "resolved": without_secrets(data.resolved),
        "fingerprint": without_secrets(data.fingerprint),
    }
    plain: dict[str, Any] = _plain(content)
    return plain


def _numbers(data: ReportData, members: Sequence[TrialSummary]) -> list[int]:
    """Numbers of the members of a front; none with one objective."""
    return [record.number for record in members] if len(data.objectives) > 1 else []


def _trade_off(data: ReportData) -> dict[str, Any] | None:
    """What the leading trial trades, and the trial that trades nothing, with its export."""
    traded = trade_off(data)
    if traded is None:
        return None
    alternative: dict[str, Any] | None = None
    if traded.alternative is not None:
        command = export_command(data, traded.alternative.trial)
        alternative = {**asdict(traded.alternative), "export": command}
    return {**asdict(traded), "alternative": alternative}


def _row(row: Row) -> dict[str, Any]:
    scores = {
        split: {"values": score.values, "errors": score.errors, "missed": score.missed}
        for split, score in row.scores.items()
    }
    marks = {"best_anchor": row.best_anchor, "winner": row.winner}
    return {"trial": row.trial, "name": row.name, "state": row.state, "scores": scores, **marks}


def trial_dict(record: TrialSummary) -> dict[str, Any]:
    """A trial as JSON-able numbers."""
    return {
        "number": record.number,
        "kind": record.kind,
        "name": record.name,
        "state": record.state,
        "values": record.values,
        "errors": record.errors,
        "stopped": record.stopped,
        "estimates": record.estimates,
        "estimate_errors": record.estimate_errors,
        "violations": record.violations,
        "seconds": record.seconds,
        "same_as": record.same_as,
    }


def _progress(data: ReportData) -> dict[str, Any]:
    course = progress(data)
    return {
        "what": course.title,
        "higher_is_better": course.higher_is_better,
        "numbers": course.numbers,
        "values": course.values,
        "best": course.best,
        "errors": course.errors,
        "anchors": course.anchors,
        "hypervolume": data.complete.hypervolumes,
    }


def _coefficients(data: ReportData) -> dict[str, Any] | None:
    table = heat_map(data)
    if table is None:
        return None
    return {
        "trial": table.trial,
        "rows": table.rows,
        "columns": table.columns,
        "values": table.values,
    }


def _plain(value: Any) -> Any:
    """Arrays, tuples and mappings as JSON knows them."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
