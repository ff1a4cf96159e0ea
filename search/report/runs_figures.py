"""The fronts of several runs in one plotly figure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

from mergesearch.evaluators import Objective
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.coefficients import with_kept
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.front_points import Figure, hover
from mergesearch.search.report.plot_layout import focus_range
from mergesearch.search.report.tables import heading

#: Colours of runs (Okabe and Ito 2008), and symbols where these come around again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = ("circle", "square", "triangle-up", "x", "cross", "pentagon")


def runs_figure(runs: Sequence[ReportData], objectives: Sequence[Objective]) -> Figure | None:
    """The fronts and winners of runs on their search items, a panel for each pair of objectives.

    Args:
        runs: Each with a front.
        objectives: Those that all runs have.

    Returns:
        None for one objective, or where no trial is complete.
    """
    drawn = [with_kept(run) for run in runs if run.complete.records]
    if len(objectives) < 2 or not drawn:
        return None
    count = len(objectives)
    pairs = list(itertools.combinations(range(count), 2))
    traces = [
        _trace(run, number, (objectives[x], objectives[y]), (x, y - 1), first=(x, y) == (0, 1))
        for number, run in enumerate(drawn)
        for x, y in pairs
    ]
    layout: Figure = {
        "height": 540 if count == 2 else 230 * (count - 1) + 60,
        "margin": {"l": 64, "r": 24, "t": 24, "b": 48},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "grid": {"rows": count - 1, "columns": count - 1, "pattern": "coupled"},
    }
    for m in range(count - 1):
        layout[_axis("xaxis", m)] = _described(drawn, objectives[m])
        layout[_axis("yaxis", m)] = _described(drawn, objectives[m + 1])
    return {"data": traces, "layout": layout}


def _shown(run: ReportData) -> list[TrialSummary]:
    """The front of a run, with its winner last."""
    leading = run.leading
    front = [record for record in run.front if record is not leading]
    return front if leading is None else [*front, leading]


def _trace(
    run: ReportData,
    number: int,
    objectives: tuple[Objective, Objective],
    panel: tuple[int, int],
    *,
    first: bool,
) -> Figure:
    records = _shown(run)
    x, y = (objective.name for objective in objectives)
    wins = [record is run.leading for record in records]
    colour = COLOURS[number % len(COLOURS)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(run.run),
        "legendgroup": str(number),
        "showlegend": first,
        "x": [record.values[x] for record in records],
        "y": [record.values[y] for record in records],
        "xaxis": _axis("x", panel[0]),
        "yaxis": _axis("y", panel[1]),
        "text": [f"{escape(run.run)}<br>{hover(run, record)}" for record in records],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "color": colour,
            "size": [16 if win else 8 for win in wins],
            "symbol": ["star" if win else SYMBOLS[number % len(SYMBOLS)] for win in wins],
        },
    }


def _described(runs: Sequence[ReportData], objective: Objective) -> Figure:
    """The axis of an objective."""
    values = [record.values[objective.name] for run in runs for record in _shown(run)]
    title = {"text": escape(heading(objective))}
    return {"title": title, "range": list(focus_range(values, [], []))}


def _axis(name: str, index: int) -> str:
    return name + (str(index + 1) if index else "")
