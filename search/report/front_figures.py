"""The front of a study as plotly figures: the same for report page, dashboard and notebook.

Anchors and the winner are named, axes show the front and not what lies far from it, and every point
says its scores, its mean coefficients and, as ``customdata``, its trial.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from html import escape

import numpy as np

from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.coefficients import with_kept
from mergesearch.search.report.data import ReportData, label
from mergesearch.search.report.front_points import Array, Figure, FrontPoints, PointClass
from mergesearch.search.report.plot_layout import (
    BLUE,
    TEXT_HEIGHT,
    label_sides,
    spread,
    staircase,
)

#: Width and height of a plane of the usual size, in typographic points, less margins.
PAGE = np.array([750.0, 340.0])
#: Share of a plane's width that names at its edge may cover.
NEAR_EDGE = 0.25
#: Three-dimensional scatter knows few symbols: a cross stands out as the star does in the plane.
CUBE_SYMBOLS = {
    "trial": "circle",
    "front": "circle",
    "anchor": "diamond",
    "winner": "cross",
    "best so far": "cross",
    "recommended front": "circle-open",
}


def front_figure(data: ReportData, most: int | None = None) -> Figure | None:
    """The front: a plane for two objectives, a cube for three, one panel per pair above.

    Args:
        data: Of the run.
        most: Dominated trials to draw; by default all, and fewer in panels of pairs.

    Returns:
        None with one objective or without a complete trial.
    """
    if not data.complete.records or len(data.objectives) == 1:
        return None
    drawn = {2: _plane, 3: _cube}.get(len(data.objectives), _matrix)
    return drawn(FrontPoints(with_kept(data), most))


def matrix_figure(data: ReportData, most: int | None = None) -> Figure | None:
    """Every pair of three objectives or more in a panel of its own; None for fewer.

    Arguments are those of :func:`front_figure`.
    """
    if not data.complete.records or len(data.objectives) < 3:
        return None
    return _matrix(FrontPoints(with_kept(data), most))


def _plane(points: FrontPoints) -> Figure:
    data = points.data
    traces = [
        {"type": "scatter", **points.trace(each, {"x": 0, "y": 1})} for each in points.classes
    ]
    far = _far_anchors(points)
    layout: Figure = {
        "height": 540,
        "margin": {"l": 64, "r": 24, "t": 24, "b": 48},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "xaxis": points.axis(0),
        "yaxis": points.axis(1),
        "annotations": far,
    }
    _name_points(points, traces, far)
    traces = [*traces[:2], *traces[4:], *traces[2:4]]
    steps = staircase(points.values(data.front), *data.objectives)
    line = {"color": BLUE, "width": 1.5}
    edge = {"x": steps[:, 0].tolist(), "y": steps[:, 1].tolist(), "line": line}
    traces.insert(
        1, {"type": "scatter", "mode": "lines", "showlegend": False, "hoverinfo": "skip", **edge}
    )
    return {"data": traces, "layout": layout}


def _name_points(points: FrontPoints, traces: Sequence[Figure], far: Sequence[Figure]) -> None:
    """Label anchors and winner beside their points, placed as for a page of the usual width."""
    low, high = np.array(points.ranges).T
    scaled = [(points.values(c.records) - low) / (high - low) * PAGE for c in points.classes]
    named = [(2, r) for r in points.classes[2].records]
    named += [(3, r) for r in points.classes[3].records if r.kind != "anchor"]
    places = np.concatenate([scaled[2], scaled[3][: len(named) - len(scaled[2])]])
    names = [_name(points, record) if index == 3 else label(record) for index, record in named]
    obstacles = np.concatenate([*scaled[1:4], *(_under(each, low, high) for each in far)])
    sides = label_sides(places, names, obstacles, (0.0, 0.0, float(PAGE[0]), float(PAGE[1])))
    for index in (2, 3):
        at = [i for i, (trace, _) in enumerate(named) if trace == index]
        if not at:
            continue
        _label(traces[index], [names[i] for i in at], [_side(*sides[i]) for i in at])


def _label(trace: Figure, names: Sequence[str], positions: Sequence[str]) -> None:
    """Write names beside points, whose texts under the mouse stay."""
    trace.update(mode="markers+text", hovertext=trace["text"], textfont={"size": 11})
    trace.update(text=[escape(name) for name in names], textposition=list(positions))
    trace["hovertemplate"] = "%{hovertext}<extra></extra>"


def _under(name: Figure, low: Array, high: Array) -> Array:
    """Places that a name at the edge hides, ``(places, 2)``."""
    x, y = (np.array([name["x"], name["y"]]) - low) / (high - low) * PAGE
    width = 4.7 * len(name["text"])
    left = {"left": x, "center": x - width / 2, "right": x - width}[name["xanchor"]]
    return np.array([[left + share * width, y] for share in (0.1, 0.4, 0.7, 1.0)])


def _name(points: FrontPoints, record: TrialSummary) -> str:
    return f"{points.classes[3].name}: {label(record)}"


def _side(dx: int, dy: int) -> str:
    return f"{('bottom', 'middle', 'top')[dy + 1]} {('left', 'center', 'right')[dx + 1]}"


#: Where an anchor lies beyond an axis -> arrow and alignment of its name at the edge.
BESIDE = {-1: ("← ", "left"), 0: ("", "center"), 1: ("→ ", "right")}
ABOVE = {-1: ("↓ ", "bottom"), 0: ("", "middle"), 1: ("↑ ", "top")}


def _far_anchors(points: FrontPoints) -> list[Figure]:
    """Names of anchors beyond the axes of a plane, at the edge where these lie."""
    low, high = np.array(points.ranges).T
    anchors = points.classes[2].records
    beyond = points.beyond(anchors)
    values = np.clip(points.values(anchors), low, high)
    # Names on the left or right edge are moved apart, those above or below have room.
    heights = (values[:, 1] - low[1]) / (high[1] - low[1])
    # Anchors inside the axes that lie close to the edge keep room for their own names.
    shares = (values[:, 0] - low[0]) / (high[0] - low[0])
    for edge, near in ((-1, shares < NEAR_EDGE), (1, shares > 1 - NEAR_EDGE)):
        at = np.flatnonzero(beyond[:, 0] == edge)
        others = np.flatnonzero(near & ~beyond.any(axis=1))
        moved = spread(heights[[*at, *others]].tolist(), TEXT_HEIGHT)[: len(at)]
        heights[at] = np.clip(moved, 0, 1)
    values[:, 1] = low[1] + heights * (high[1] - low[1])
    return [
        {
            "x": x,
            "y": y,
            "text": (BESIDE[dx][0] or ABOVE[dy][0]) + escape(label(record)),
            "hovertext": points.texts[record.number],
            "xanchor": BESIDE[dx][1],
            "yanchor": ABOVE[dy][1],
            "showarrow": False,
            "font": {"size": 11},
        }
        for record, (x, y), (dx, dy) in zip(anchors, values.tolist(), beyond.tolist(), strict=True)
        if dx or dy
    ]


def _left_out(points: FrontPoints, x: float, y: float) -> list[Figure]:
    """The names of the anchors beyond the axes, if there are any, below a place of the figure."""
    anchors = points.classes[2].records
    beyond = points.beyond(anchors)
    pairs = zip(anchors, beyond, strict=True)
    names = [escape(label(record)) for record, sides in pairs if sides.any()]
    if not names:
        return []
    text = "beyond the axes:<br>" + "<br>".join(names)
    place = {"xref": "paper", "yref": "paper", "x": x, "y": y, "showarrow": False}
    corner = {"xanchor": "left", "yanchor": "top", "align": "left"}
    return [{**place, **corner, "text": text, "font": {"size": 11}}]


def _cube(points: FrontPoints) -> Figure:
    traces = []
    for each in points.layers:
        marker = {**each.marker, "size": each.marker["size"] * 0.6}
        marker["symbol"] = CUBE_SYMBOLS[each.name]
        inside = [r for r in each.records if not points.beyond([r]).any()]
        plain = PointClass(each.name, inside, marker)
        traces.append({"type": "scatter3d", **points.trace(plain, {"x": 0, "y": 1, "z": 2})})
        if each.name in ("anchor", "winner", "best so far"):
            names = [label(r) if each.name == "anchor" else _name(points, r) for r in inside]
            _label(traces[-1], names, ["top center"] * len(names))
    scene: Figure = {axis: points.axis(m) for m, axis in enumerate(("xaxis", "yaxis", "zaxis"))}
    scene["camera"] = {
        "eye": {"x": 1.5, "y": 1.5, "z": 0.9},
        "center": {"x": 0, "y": 0, "z": -0.15},
    }
    layout: Figure = {"height": 640, "margin": {"l": 0, "r": 0, "t": 24, "b": 0}, "scene": scene}
    layout["annotations"] = _left_out(points, 0.0, 1.0)
    return {"data": traces, "layout": layout}


def _matrix(points: FrontPoints) -> Figure:
    count = len(points.data.objectives)
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
        "hovermode": "closest",
        "dragmode": "select",
        "annotations": _left_out(points, 1.0 / (count - 1) + 0.03, 1.0),
    }
    for m in range(count - 1):
        layout[_axis("xaxis", m)] = points.axis(m)
        layout[_axis("yaxis", m)] = points.axis(m + 1)
    # Error bars of points that are not brushed would stay: only the winner has any.
    classes = [replace(each, bars=len(each.records) == 1) for each in points.layers]
    traces = [
        {
            "type": "scatter",
            **points.trace(each, {"x": x, "y": y}),
            "xaxis": _axis("x", x),
            "yaxis": _axis("y", y - 1),
            "legendgroup": each.name,
            "showlegend": (x, y) == (0, 1),
        }
        for x, y in itertools.combinations(range(count), 2)
        for each in classes
    ]
    return {"data": traces, "layout": layout}


def _axis(name: str, index: int) -> str:
    """plotly's name of axis ``index`` counted from 0: ``x``, ``x2``, ``x3``."""
    return name + (str(index + 1) if index else "")
