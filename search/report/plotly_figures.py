"""Interactive figures of a study as plotly's JSON, made without importing plotly.

Colours of text, lines and grid are left to the page, which knows whether the reader prefers light
or dark.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.report.coefficients import heat_map
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.plot_layout import (
    BLUE,
    GREY,
    ORANGE,
    TEXT_HEIGHT,
    VERMILLION,
    colour_range,
    label_sides,
    spread,
    staircase,
    visible_range,
)
from mergesearch.search.report.png_plots import anchors_hypervolume
from mergesearch.search.report.progress import progress
from mergesearch.search.report.tables import heading
from mergesearch.search.report.wording import plus_minus

Figure = dict[str, Any]
Array = npt.NDArray[np.float64]

#: Most dominated trials that each panel of a matrix of pairs draws; vector graphics are slow.
THINNED = 1000


def draw_figures(data: ReportData) -> dict[str, Figure]:
    """Section name -> figure, for those sections that the study has something for."""
    if not data.complete.records:
        return {}
    figures = {
        "progress": progress_figure(data),
        "front": front_figure(data),
        "coefficients": heat_figure(data),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def hover(data: ReportData, record: TrialRecord) -> str:
    """The text beside a point under the mouse: trial, name, every value."""
    name = f" · {escape(record.name)}" if record.name else ""
    values = [
        f"{escape(o.name)}: {plus_minus(record.values[o.name], record.errors.get(o.name))}"
        for o in data.objectives
    ]
    return "<br>".join([f"<b>trial {record.number}</b>{name}", *values])


def progress_figure(data: ReportData) -> Figure:
    """Best so far with its standard error and the anchors, below the hypervolume if there is one.

    There is one with several objectives.
    """
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


def _classes(data: ReportData) -> list[tuple[str, list[TrialRecord], Figure]]:
    """The groups of points of a front: name, trials, marker."""
    members = {record.number for record in data.front}
    dominated = [r for r in data.complete.records if r.number not in members and r.kind != "anchor"]
    anchors = [record for record in data.anchors if record.state == "complete"]
    leading = [] if data.leading is None else [data.leading]
    edge = {"color": "white", "width": 1}
    ring = {"color": BLUE, "size": 11, "symbol": "circle-open"}
    recommended = [("recommended front", data.recommended, ring)] if data.by_estimates else []
    return [
        ("trial", dominated, {"color": GREY, "size": 6, "opacity": 0.6}),
        ("front", data.front, {"color": BLUE, "size": 8}),
        ("anchor", anchors, {"color": ORANGE, "size": 9, "symbol": "diamond", "line": edge}),
        (
            "winner" if data.winner is not None else "best so far",
            leading,
            {"color": VERMILLION, "size": 17, "symbol": "star", "line": edge},
        ),
        *recommended,
    ]


def _points(data: ReportData, records: Sequence[TrialRecord], axes: Mapping[str, int]) -> Figure:
    """Coordinates on the named axes and hover texts."""
    names = {axis: data.objectives[m].name for axis, m in axes.items()}
    values: Figure = {
        axis: [record.values[name] for record in records] for axis, name in names.items()
    }
    texts = [hover(data, record) for record in records]
    return {**values, "mode": "markers", "text": texts, "hovertemplate": "%{text}<extra></extra>"}


def front_figure(data: ReportData) -> Figure | None:
    """The front: a plane for two objectives, a cube for three, one panel per pair above."""
    draw = {1: lambda _: None, 2: _plane, 3: _cube}.get(len(data.objectives), _pairs)
    return draw(data)


def _plane(data: ReportData) -> Figure:
    first, second = data.objectives
    classes = _classes(data)
    traces = [
        {
            "type": "scatter",
            "name": name,
            "marker": marker,
            **_points(data, records, {"x": 0, "y": 1}),
        }
        for name, records, marker in classes
    ]
    ranges = [_range(data, 0), _range(data, 1)]
    members, anchors = (
        np.array([[r.values[o.name] for o in data.objectives] for r in classes[i][1]])
        for i in (1, 2)
    )
    _name_anchors(traces[2], anchors.reshape(-1, 2), members.reshape(-1, 2), ranges)
    steps = staircase(members.reshape(-1, 2), first, second)
    line = {"color": BLUE, "width": 1.5}
    edge = {"x": _floats(steps[:, 0]), "y": _floats(steps[:, 1]), "line": line, "hoverinfo": "skip"}
    traces.insert(1, {"type": "scatter", "mode": "lines", "showlegend": False, **edge})
    layout: Figure = {
        "height": 540,
        "margin": {"l": 64, "r": 24, "t": 24, "b": 48},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    }
    for axis, objective, bounds in zip(("xaxis", "yaxis"), data.objectives, ranges, strict=True):
        layout[axis] = {"title": {"text": escape(heading(objective))}, "range": bounds}
    return {"data": traces, "layout": layout}


def _name_anchors(
    trace: Figure, anchors: Array, members: Array, ranges: Sequence[Sequence[float]]
) -> None:
    """Turn hover texts into labels beside the points, placed as for a page of the usual width."""
    low, high = np.array(ranges).T
    page = np.array([750.0, 340.0])  # typographic points, less margins
    anchors, members = ((points - low) / (high - low) * page for points in (anchors, members))
    names = [text.partition("<br>")[0].partition("</b> · ")[2] for text in trace["text"]]
    obstacles = np.concatenate([anchors, members])
    sides = label_sides(anchors, names, obstacles, (0.0, 0.0, float(page[0]), float(page[1])))
    words = [
        f"{('bottom', 'middle', 'top')[dy + 1]} {('left', 'center', 'right')[dx + 1]}"
        for dx, dy in sides
    ]
    trace.update(mode="markers+text", hovertext=trace["text"], text=names, textposition=words)
    trace.update(hovertemplate="%{hovertext}<extra></extra>", textfont={"size": 11})


def _range(data: ReportData, m: int) -> list[float]:
    name = data.objectives[m].name
    keep = [r.values[name] for r in data.complete.records if r.kind == "anchor"] + [
        r.values[name] for r in data.front
    ]
    return list(visible_range([record.values[name] for record in data.complete.records], keep))


#: Three-dimensional scatter knows few symbols: a cross stands out as the star does in the plane.
CUBE_SYMBOLS = {
    "trial": "circle",
    "front": "circle",
    "anchor": "diamond",
    "winner": "cross",
    "best so far": "cross",
    "recommended front": "circle-open",
}


def _cube(data: ReportData) -> Figure:
    traces = []
    for name, records, marker in _classes(data):
        marker = {**marker, "size": marker["size"] * 0.6, "symbol": CUBE_SYMBOLS[name]}
        points = _points(data, records, {"x": 0, "y": 1, "z": 2})
        traces.append({"type": "scatter3d", "name": name, "marker": marker, **points})
    axes = zip(("xaxis", "yaxis", "zaxis"), data.objectives, strict=True)
    scene: Figure = {
        axis: {"title": {"text": escape(heading(objective))}} for axis, objective in axes
    }
    scene["camera"] = {
        "eye": {"x": 1.5, "y": 1.5, "z": 0.9},
        "center": {"x": 0, "y": 0, "z": -0.15},
    }
    return {
        "data": traces,
        "layout": {"height": 640, "margin": {"l": 0, "r": 0, "t": 24, "b": 0}, "scene": scene},
    }


def _pairs(data: ReportData) -> Figure:
    count = len(data.objectives)
    traces: list[Figure] = []
    layout: Figure = {
        "height": 230 * (count - 1) + 60,
        "margin": {"l": 64, "r": 24, "t": 24, "b": 48},
        "grid": {
            "rows": count - 1,
            "columns": count - 1,
            "pattern": "coupled",
            "xgap": 0.06,
            "ygap": 0.06,
        },
        "legend": {"x": 1, "xanchor": "right", "y": 1},
    }
    for m in range(count - 1):
        layout[_axis("xaxis", m)] = {
            "title": {"text": escape(heading(data.objectives[m]))},
            "range": _range(data, m),
        }
        title = {"text": escape(heading(data.objectives[m + 1]))}
        layout[_axis("yaxis", m)] = {"title": title, "range": _range(data, m + 1)}
    for x, y in itertools.combinations(range(count), 2):
        for name, records, marker in _classes(data):
            step = -(-len(records) // THINNED) or 1
            points = _points(data, records[::step], {"x": x, "y": y})
            panel = {"xaxis": _axis("x", x), "yaxis": _axis("y", y - 1)}
            once = {"legendgroup": name, "showlegend": (x, y) == (0, 1)}
            traces.append(
                {"type": "scatter", "name": name, "marker": marker, **points, **panel, **once}
            )
    return {"data": traces, "layout": layout}


def _axis(name: str, index: int) -> str:
    """plotly's name of axis ``index`` counted from 0: ``x``, ``x2``, ``x3``."""
    return name + (str(index + 1) if index else "")


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
