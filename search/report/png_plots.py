"""Pictures of a study as PNG, by matplotlib on its own canvas, without pyplot or a display."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.coefficients import heat_map
from mergesearch.search.report.data import ReportData, label
from mergesearch.search.report.kept import HeatMap
from mergesearch.search.report.plot_layout import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    TEXT_HEIGHT,
    VERMILLION,
    colour_range,
    label_sides,
    spread,
    staircase,
    visible_range,
)
from mergesearch.search.report.progress import progress
from mergesearch.search.report.tables import heading

Array = npt.NDArray[np.float64]

DPI = 140
#: Above this many cells the heat map shows colours alone.
ANNOTATED = 160
STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": "#BDC1C6",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "grid.color": "#E8EAED",
    "text.color": INK,
    "xtick.color": "#5F6368",
    "ytick.color": "#5F6368",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


def draw_all(data: ReportData) -> dict[str, bytes]:
    """File name -> PNG of every picture that the study has something for."""
    pictures: dict[str, Callable[[ReportData], Any]] = {
        "best_so_far.png": best_so_far,
        "front.png": front,
        "coefficients.png": coefficients,
    }
    from matplotlib import rc_context

    with rc_context(STYLE):
        figures = {name: draw(data) for name, draw in pictures.items()}
        return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def _figure(width: float, height: float) -> Any:
    """An empty figure of ``width`` x ``height`` inches on an Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # Without metadata the same study gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def best_so_far(data: ReportData) -> Any | None:
    """Best value over trials; with several objectives the hypervolume above the weighted score."""
    if not data.complete.records:
        return None
    if len(data.objectives) == 1:
        figure = _figure(8, 4)
        _progress(figure.subplots(), data)
        return figure
    figure = _figure(8, 6)
    above, below = figure.subplots(2, 1, sharex=True)
    _hypervolume(above, data)
    _progress(below, data)
    above.set_xlabel("")
    return figure


def _progress(axes: Any, data: ReportData) -> None:
    course = progress(data)
    higher = "higher" if course.higher_is_better else "lower"
    axes.set(xlabel="trial", title=f"{course.title} ({higher} is better)")
    axes.grid(True, axis="y")
    bounds = visible_range(course.values, [*course.best, *course.anchors.values()])
    axes.set_ylim(*bounds)
    axes.plot(
        course.numbers, course.values, "o", color=GREY, markersize=3, alpha=0.6, markeredgewidth=0
    )
    low = course.best - course.errors
    high = course.best + course.errors
    axes.fill_between(course.numbers, low, high, step="post", color=BLUE, alpha=0.18, linewidth=0)
    axes.step(course.numbers, course.best, where="post", color=BLUE, linewidth=1.8, zorder=3)
    _anchor_lines(axes, course.anchors, bounds)


def _anchor_lines(axes: Any, anchors: Mapping[str, float], bounds: tuple[float, float]) -> None:
    span = bounds[1] - bounds[0]
    heights = spread([(value - bounds[0]) / span for value in anchors.values()], TEXT_HEIGHT)
    for (name, value), height in zip(anchors.items(), heights, strict=True):
        axes.axhline(value, color=ORANGE, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            name,
            xy=(1.0, (value - bounds[0]) / span),
            xytext=(1.025, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={
                "arrowstyle": "-",
                "color": ORANGE,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def _hypervolume(axes: Any, data: ReportData) -> None:
    numbers = [record.number for record in data.complete.records]
    axes.set(xlabel="trial", title="hypervolume of the front so far (higher is better)")
    axes.grid(True, axis="y")
    volumes = data.complete.hypervolumes
    axes.step(numbers, volumes, where="post", color=BLUE, linewidth=1.8, zorder=3)
    axes.set_ylim(bottom=0)
    alone = anchors_hypervolume(data)
    if alone is not None:
        axes.axhline(alone, color=ORANGE, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            "anchors alone",
            (1.025, alone),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
        )


def anchors_hypervolume(data: ReportData) -> float | None:
    """Hypervolume of the complete anchors by themselves, in the study's normalised losses."""
    complete = data.complete
    rows = [
        row
        for record, row in zip(complete.records, complete.losses, strict=True)
        if record.kind == "anchor"
    ]
    if not rows or complete.normaliser is None:
        return None
    return complete.normaliser.hypervolume(np.array(rows))


def front(data: ReportData) -> Any | None:
    """All trials, the front, the anchors and the winner: a panel for each pair of objectives."""
    count = len(data.objectives)
    if count < 2 or not data.complete.records:
        return None
    side = 6.4 if count == 2 else 3.2 * (count - 1)
    figure = _figure(side * 1.15, side)
    grid = figure.subplots(count - 1, count - 1, squeeze=False)
    for row, column in itertools.product(range(count - 1), range(count - 1)):
        if column > row:
            grid[row, column].axis("off")
        else:
            _pair(grid[row, column], data, column, row + 1, outer=(row == count - 2, column == 0))
    handles, names = grid[0, 0].get_legend_handles_labels()
    if count == 2:
        grid[0, 0].legend(handles, names, frameon=False, loc="best")
    else:
        figure.legend(handles, names, frameon=False, loc="upper right")
    return figure


def _pair(axes: Any, data: ReportData, x: int, y: int, outer: tuple[bool, bool]) -> None:
    first = data.objectives[x]
    second = data.objectives[y]
    members = {record.number for record in data.front}
    shown: dict[str, list[TrialSummary]] = {
        "trial": [
            r for r in data.complete.records if r.number not in members and r.kind != "anchor"
        ],
        "front": data.front,
        "anchor": [r for r in data.anchors if r.state == "complete"],
        "winner" if data.winner is not None else "best so far": [data.leading]
        if data.leading is not None
        else [],
        "recommended front": data.recommended if data.by_estimates else [],
    }
    styles: list[dict[str, Any]] = [
        {"s": 14, "color": GREY, "alpha": 0.6, "linewidths": 0},
        {"s": 26, "color": BLUE, "linewidths": 0, "zorder": 3},
        {
            "s": 34,
            "color": ORANGE,
            "marker": "D",
            "edgecolors": "white",
            "linewidths": 0.8,
            "zorder": 4,
        },
        {
            "s": 170,
            "color": VERMILLION,
            "marker": "*",
            "edgecolors": "white",
            "linewidths": 0.8,
            "zorder": 5,
        },
        {"s": 60, "facecolors": "none", "edgecolors": BLUE, "linewidths": 1.2, "zorder": 3},
    ]
    points = {name: _positions(records, first, second) for name, records in shown.items()}
    for (name, positions), style in zip(points.items(), styles, strict=True):
        if len(positions) or name != "recommended front":
            axes.scatter(positions[:, 0], positions[:, 1], label=name, **style)
    everything = np.concatenate(list(points.values()))
    keep = np.concatenate([points["front"], points["anchor"]])
    axes.set_xlim(*visible_range(everything[:, 0], keep[:, 0]))
    axes.set_ylim(*visible_range(everything[:, 1], keep[:, 1]))
    axes.grid(True)
    axes.set_xlabel(heading(first) if outer[0] else "")
    axes.set_ylabel(heading(second) if outer[1] else "")
    if len(data.objectives) == 2:
        steps = staircase(points["front"], first, second)
        axes.plot(steps[:, 0], steps[:, 1], color=BLUE, linewidth=1.2, zorder=2)
        _name_points(axes, points["anchor"], [label(r) for r in shown["anchor"]], avoid=keep)


def _positions(records: Sequence[TrialSummary], first: Objective, second: Objective) -> Array:
    return np.array([[r.values[first.name], r.values[second.name]] for r in records]).reshape(-1, 2)


def _name_points(axes: Any, points: Array, names: Sequence[str], avoid: Array) -> None:
    # Settles the axes: positions on the paper depend on their limits.
    axes.get_figure().draw_without_rendering()
    to_paper = 72 / DPI
    to_pixels = axes.transData.transform
    frame = axes.get_window_extent()
    extent = tuple(edge * to_paper for edge in (frame.x0, frame.y0, frame.x1, frame.y1))
    sides = label_sides(to_pixels(points) * to_paper, names, to_pixels(avoid) * to_paper, extent)
    for point, name, (dx, dy) in zip(points, names, sides, strict=True):
        aligned = {
            "ha": ("right", "center", "left")[dx + 1],
            "va": ("top", "center", "bottom")[dy + 1],
        }
        axes.annotate(
            name,
            point,
            (7 * dx, 6 * dy),
            textcoords="offset points",
            fontsize=8,
            zorder=6,
            **aligned,
        )


def coefficients(data: ReportData) -> Any | None:
    """Heat map of the leading trial's coefficients: experts x blocks."""
    table = heat_map(data)
    if table is None:
        return None
    rows, columns = table.values.shape
    annotated = rows * columns <= ANNOTATED
    cell_width = 0.62 if annotated else max(0.08, min(0.4, 14 / columns))
    figure = _figure(
        min(max(2.4 + cell_width * columns, 5.5), 20), min(max(1.9 + 0.42 * rows, 2.5), 12)
    )
    axes = figure.subplots()
    low, high, colours = colour_range(table.values)
    image = axes.imshow(table.values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    title = (
        "coefficients of the winner"
        if data.winner is not None
        else "coefficients of the best trial so far"
    )
    axes.set_title(f"{title}, trial {table.trial}")
    axes.set_yticks(range(rows), table.rows)
    step = -(-columns // 60)
    axes.set_xticks(
        range(0, columns, step), table.columns[::step], rotation=45 if columns > 4 else 0
    )
    for tick in axes.get_xticklabels():
        tick.set(ha="right" if columns > 4 else "center", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02).outline.set_visible(False)
    if annotated:
        _annotate_cells(axes, table, image)
    return figure


def _annotate_cells(axes: Any, table: HeatMap, image: Any) -> None:
    for (row, column), value in np.ndenumerate(table.values):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.45
        axes.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else INK,
        )
