"""Interactive figures of a study as plotly's JSON, made without importing plotly.

Colours of text, lines and grid are left to the page, which knows whether the reader prefers light
or dark.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from mergesearch.search.report.coefficients import heat_map, with_kept
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.front_figures import front_figure, matrix_figure
from mergesearch.search.report.front_points import Figure, hover
from mergesearch.search.report.plot_layout import (
    BLUE,
    GREY,
    ORANGE,
    TEXT_HEIGHT,
    colour_range,
    spread,
    visible_range,
)
from mergesearch.search.report.png_plots import anchors_hypervolume
from mergesearch.search.report.progress import progress

__all__ = ["Figure", "draw_figures", "front_figure", "heat_figure", "progress_figure"]


def draw_figures(data: ReportData) -> dict[str, Figure]:
    """Section name -> figure, for those sections that the study has something for."""
    if not data.complete.records:
        return {}
    data = with_kept(data)
    figures = {
        "progress": progress_figure(data),
        "front": front_figure(data),
        "pairs": matrix_figure(data) if len(data.objectives) == 3 else None,
        "coefficients": heat_figure(data),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def progress_figure(data: ReportData) -> Figure:
    """Best so far with its standard error and the anchors, below the hypervolume if there is one.

    There is one with several objectives.
    """
    data = with_kept(data)
    course = progress(data)
    numbers = course.numbers.tolist()
    best = course.best
    errors = np.nan_to_num(course.errors)
    bounds = visible_range(course.values, [*course.best, *course.anchors.values()])
    band = {
        "mode": "lines",
        "line": {"width": 0, "shape": "hv"},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    traces = [
        {**band, "x": numbers, "y": _floats(best - errors)},
        {
            **band,
            "x": numbers,
            "y": _floats(best + errors),
            "fill": "tonexty",
            "fillcolor": "rgba(0,114,178,0.2)",
        },
        {
            "mode": "markers",
            "name": "trial",
            "x": numbers,
            "y": _floats(course.values),
            "text": [hover(data, record) for record in data.complete.records],
            "customdata": numbers,
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": GREY, "size": 5, "opacity": 0.7},
        },
        {
            "mode": "lines",
            "name": "best so far",
            "x": numbers,
            "y": _floats(best),
            "line": {"color": BLUE, "width": 2.5, "shape": "hv"},
            "hovertemplate": "best %{y:.5g}<extra></extra>",
        },
    ]
    several = len(data.objectives) > 1
    layout: Figure = {
        "height": 620 if several else 400,
        "margin": {"l": 64, "r": 150, "t": 24, "b": 48},
        "xaxis": {"title": {"text": "trial"}},
        "yaxis": {
            "title": {"text": escape(course.title)},
            "range": list(bounds),
            "domain": [0, 0.56 if several else 1],
        },
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        "shapes": [_level("y", value) for value in course.anchors.values()],
        "annotations": _anchor_names(course.anchors, bounds, 0.56 if several else 1.0),
    }
    if several:
        _add_hypervolume(data, traces, layout)
    return {"data": [{"type": "scatter", **trace} for trace in traces], "layout": layout}


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values]


def _level(axis: str, value: float) -> Figure:
    line = {"color": ORANGE, "width": 1, "dash": "dash"}
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "yref": axis,
        "y0": value,
        "y1": value,
        "line": line,
    }


def _anchor_names(
    anchors: Mapping[str, float], bounds: tuple[float, float], share: float
) -> list[Figure]:
    """Names of the anchors at the right edge of the lowest ``share`` of the plot.

    They are moved apart where they would overlap.
    """
    heights = [(value - bounds[0]) / (bounds[1] - bounds[0]) * share for value in anchors.values()]
    common = {
        "xref": "paper",
        "yref": "paper",
        "x": 1.01,
        "xanchor": "left",
        "yanchor": "middle",
        "showarrow": False,
    }
    gap = TEXT_HEIGHT if share == 1 else 0.6 * TEXT_HEIGHT
    return [
        {**common, "y": height, "text": escape(name), "font": {"size": 11}}
        for name, height in zip(anchors, spread(heights, gap), strict=True)
    ]


def _add_hypervolume(data: ReportData, traces: list[Figure], layout: Figure) -> None:
    layout["yaxis2"] = {"title": {"text": "hypervolume"}, "domain": [0.64, 1], "anchor": "x"}
    traces.append(
        {
            "mode": "lines",
            "name": "hypervolume",
            "x": [record.number for record in data.complete.records],
            "y": _floats(data.complete.hypervolumes),
            "yaxis": "y2",
            "line": {"color": BLUE, "width": 2, "shape": "hv"},
            "hovertemplate": "hypervolume %{y:.5g}<extra></extra>",
            "showlegend": False,
        }
    )
    alone = anchors_hypervolume(data)
    if alone is not None:
        layout["shapes"].append(_level("y2", alone))
        common = {"xref": "paper", "yref": "y2", "x": 1.01, "xanchor": "left", "showarrow": False}
        layout["annotations"].append(
            {**common, "y": alone, "text": "anchors alone", "font": {"size": 11}}
        )


def heat_figure(data: ReportData) -> Figure | None:
    """Heat map of the leading trial's coefficients."""
    table = heat_map(data)
    if table is None:
        return None
    low, high, colours = colour_range(table.values)
    scale = {"Blues": [[0, "#f7fbff"], [0.5, "#6baed6"], [1, "#08306b"]]}
    scale["RdBu"] = [
        [0, "#b2182b"],
        [0.25, "#f4a582"],
        [0.5, "#f7f7f7"],
        [0.75, "#92c5de"],
        [1, "#2166ac"],
    ]
    trace = {
        "type": "heatmap",
        "x": [escape(name) for name in table.columns],
        "y": [escape(name) for name in table.rows],
        "z": [_floats(row) for row in table.values],
        "zmin": low,
        "zmax": high,
        "colorscale": scale[colours],
        "hovertemplate": "%{y} · %{x}: %{z:.4f}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"thickness": 12, "outlinewidth": 0},
    }
    if table.values.size <= 400:
        trace["texttemplate"] = "%{z:.2f}"
    layout = {
        "height": min(110 + 34 * len(table.rows), 900),
        "margin": {"l": 120, "r": 24, "t": 30, "b": 56},
        "xaxis": {"type": "category"},
        "yaxis": {"type": "category", "autorange": "reversed"},
    }
    return {"data": [trace], "layout": layout}
