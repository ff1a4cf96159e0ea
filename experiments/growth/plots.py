"""Plots of costs on logarithmic axes, with the slope that is expected beside what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: Colours that colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#E8EAED",
    "svg.fonttype": "none",
    "svg.hashsalt": "growth",
}


@dataclass(frozen=True)
class Line:
    """A cost by a size.

    Attributes:
        label: What it is of.
        sizes: Of what grows.
        costs: Measured.
        expected: Exponent of the size that theory gives.
    """

    label: str
    sizes: Sequence[float]
    costs: Sequence[float]
    expected: float = 0.0

    @property
    def slope(self) -> float:
        """Exponent of a power law through the logarithms."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.costs), 1)[0])

    def theory(self) -> list[float]:
        """The expected power law at the sizes, at the height of the measured costs."""
        shape = np.asarray(self.sizes, dtype=np.float64) ** self.expected
        height = np.exp(np.mean(np.log(np.asarray(self.costs) / shape)))
        return [float(cost) for cost in height * shape]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]


def draw(file: Path, panels: Sequence[Panel]) -> None:
    """Write panels side by side as SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            _draw_panel(axes, panel)
        figure.savefig(file, format="svg", metadata={"Date": None})


def _draw_panel(axes: Any, panel: Panel) -> None:
    for colour, line in zip(COLOURS, panel.lines, strict=False):
        axes.plot(line.sizes, line.costs, "o-", color=colour, markersize=4, label=_label(line))
        axes.plot(line.sizes, line.theory(), "--", color=colour, linewidth=1, alpha=0.7)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, xscale="log", yscale="log")
    low, high = axes.get_ylim()
    if high < 4 * low:  # a flat line fills the panel with its noise
        axes.set_ylim(low / 3, high * 3)
    axes.minorticks_off()
    axes.grid(visible=True)
    axes.legend(frameon=False, fontsize=7.5)


def _label(line: Line) -> str:
    return f"{line.label}: slope {line.slope:.2f}, expected {line.expected:g} (dashed)"
