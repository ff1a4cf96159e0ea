"""The panel beside the figures of a report: what it can show of every trial, and its controls."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import numpy as np

from mergesearch.evaluators import SPLITS, Split
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.coefficients import with_kept
from mergesearch.search.report.data import ReportData, label
from mergesearch.search.report.headline import (
    export_command,
    measure_commands,
    recipe_command,
)
from mergesearch.search.report.page.elements import as_script
from mergesearch.search.report.tables import MISSING, heading
from mergesearch.search.report.wording import plus_minus

#: Front members that the list of trials offers; others are found by their number.
OFFERED = 100
#: A number that no trial has, which stands for any in a command.
ANY = 987_654_321_987


def panel_data(data: ReportData) -> dict[str, Any]:
    """What the script fills the panel with, JSON-able."""
    data = with_kept(data)
    leading = data.leading
    kept = data.kept
    return {
        "objectives": [heading(objective) for objective in data.objectives],
        "names": [objective.name for objective in data.objectives],
        "directions": [] if kept is None else list(kept.directions),
        "leading": None if leading is None else leading.number,
        "trials": [_told(data, record) for record in data.complete.records],
        "members": _members(data),
        "export": export_command(data, ANY).split(str(ANY)),
        "recipe": recipe_command(data, ANY).split(str(ANY)),
        "between": _between(data),
    }


def _told(data: ReportData, record: TrialSummary) -> dict[str, Any]:
    """One trial: number, title, scores by split, and mean coefficients where these are known."""
    told: dict[str, Any] = {
        "n": record.number,
        "t": title(data, record),
        "s": {split: _scores(data, record, split) for split in SPLITS if _any(data, split)},
    }
    means = () if data.kept is None else data.kept.means.get(record.number, ())
    return told | ({"c": [f"{mean:.3g}" for mean in means]} if means else {})


def title(data: ReportData, record: TrialSummary) -> str:
    """``trial 37 · winner, front``."""
    what = {
        "winner": record is data.winner,
        "best so far": data.winner is None and record is data.leading,
        "front": len(data.objectives) > 1 and record.number in data.expected,
        record.kind: True,
    }
    name = f" · {record.name}" if record.name else ""
    return (
        f"trial {record.number}{name} · {', '.join(each for each, holds in what.items() if holds)}"
    )


def _any(data: ReportData, split: Split) -> bool:
    return split == "search" or (data.verdict is not None and bool(data.verdict.scores.get(split)))


def _scores(data: ReportData, record: TrialSummary, split: Split) -> list[str]:
    score = data.score(record, split)
    return [
        MISSING
        if score is None or objective.name not in score.values
        else plus_minus(score.values[objective.name], score.errors.get(objective.name))
        for objective in data.objectives
    ]


def _members(data: ReportData) -> list[dict[str, Any]]:
    """Members of the recommended front with the losses that are expected, in anchors' ranges."""
    normaliser = data.complete.normaliser
    if len(data.objectives) == 1 or normaliser is None:
        return []
    return [
        {"n": number, "l": np.asarray(normaliser.normalise(data.expected[number])).tolist()}
        for number in sorted(data.expected)
    ]


def _between(data: ReportData) -> dict[str, Any] | None:
    """What is expected between trials for some weights, or why nothing is; None in older runs."""
    between = None if data.kept is None else data.kept.between
    if between is None or len(data.objectives) == 1:
        return None
    return {
        "why": between.why,
        "bounds": any(record.violations for record in data.complete.records),
        "expected": [
            {
                "w": each.weights,
                "v": [plus_minus(*pair) for pair in zip(each.values, each.errors, strict=True)],
                "c": [f"{mean:.3g}" for mean in each.means],
                "x": measure_commands(data, each.weights),
            }
            for each in between.expected
        ],
    }


def panel(data: ReportData) -> str:
    """The panel's controls as HTML, with what the script shows in it."""
    text = json.dumps(panel_data(data), allow_nan=False, separators=(",", ":"))
    return (
        '<aside id="panel" class="panel" aria-label="one trial">\n'
        f"{_weights(data)}<p class=pick><label>trial <select id=pick>{_offered(data)}</select>"
        "</label> <label>or number <input id=number type=number min=0 step=1></label></p>\n"
        '<div id="told" aria-live="polite"></div>\n</aside>\n'
        f'<script type="application/json" id="trials">{as_script(text)}</script>\n'
    )


def _weights(data: ReportData) -> str:
    """A slider for the weight of each objective; nothing for one objective."""
    if len(data.objectives) == 1:
        return ""
    most = max(data.weights) or 1.0
    sliders = "".join(
        f"<label><span>{escape(objective.name)}</span><input type=range min=0 max=100 "
        f'value="{round(100 * weight / most)}"><output></output></label>\n'
        for objective, weight in zip(data.objectives, data.weights, strict=True)
    )
    return (
        f'<fieldset id="weights"><legend>How much each objective matters</legend>\n{sliders}'
        '<p id="compromise" role="status"></p></fieldset>\n<div id="between"></div>\n'
    )


def _offered(data: ReportData) -> str:
    """Options of the list of trials: the leading one, the front, and the anchors."""
    anchors = [record for record in data.anchors if record.state == "complete"]
    leading = [] if data.leading is None else [data.leading]
    several = len(data.objectives) > 1
    groups = {
        "winner" if data.winner is not None else "best so far": leading,
        "front" if several else "best trials": data.recommended[:OFFERED],
        "anchors": anchors,
    }
    return '<option value=""></option>' + "".join(
        f'<optgroup label="{name}">'
        + "".join(f"<option value={r.number}>{escape(label(r))}</option>" for r in records)
        + "</optgroup>"
        for name, records in groups.items()
        if records
    )
