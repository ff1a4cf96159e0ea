"""The points of a front, for all figures of it: classes, coordinates, hover texts and limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.kept import Kept
from mergesearch.search.report.plot_layout import BLUE, GREY, ORANGE, VERMILLION, focus_range
from mergesearch.search.report.tables import heading
from mergesearch.search.report.wording import plus_minus

Figure = dict[str, Any]
Array = npt.NDArray[np.float64]

#: Most dominated trials that each panel of a matrix of pairs draws; vector graphics are slow.
THINNED = 1000
#: A front of more members has no error bars: they would hide each other.
MOST_BARS = 40
#: Directions whose coefficients a hover text lists.
MOST_DIRECTIONS = 12
#: Edge of anchors, dark enough to stand out from a white page.
EDGE = "#7A5200"


@dataclass(frozen=True)
class PointClass:
    """Points of a front that look alike.

    Attributes:
        name: Of the class, as the legend shows it.
        records: Their trials.
        marker: How they look.
        bars: Whether they have error bars.
    """

    name: str
    records: Sequence[TrialSummary]
    marker: Figure
    bars: bool = False


def hover(data: ReportData, record: TrialSummary) -> str:
    """The text beside a point under the mouse: trial, name, values and mean coefficients.

    Coefficients are those of :func:`mergesearch.search.report.coefficients.with_kept`.
    """
    name = f" · {escape(record.name)}" if record.name else ""
    values = [
        f"{escape(o.name)}: {plus_minus(record.values[o.name], record.errors.get(o.name))}"
        for o in data.objectives
    ]
    kept = data.kept or Kept()
    means = kept.means.get(record.number, ())
    coefficients = _coefficient_lines(kept.directions, means)
    return "<br>".join([f"<b>trial {record.number}</b>{name}", *values, *coefficients])


def _coefficient_lines(directions: Sequence[str], means: Sequence[float]) -> list[str]:
    """Mean coefficients, three to a line."""
    told = [f"{escape(name)} {mean:.3g}" for name, mean in zip(directions, means, strict=False)]
    left = len(told) - MOST_DIRECTIONS
    told = [*told[:MOST_DIRECTIONS], f"and {left} more"] if left > 0 else told
    lines = [", ".join(told[at : at + 3]) for at in range(0, len(told), 3)]
    return ["mean coefficients:", *lines] if lines else []


@dataclass(frozen=True, eq=False)
class FrontPoints:
    """The points of one front.

    Attributes:
        data: Of the run, with what is made of points and recipes.
        most: Dominated trials to draw; None draws all, and :data:`THINNED` in panels of pairs.
    """

    data: ReportData
    most: int | None

    @cached_property
    def classes(self) -> list[PointClass]:
        """The classes of points: dominated, front, anchors, winner, and a recommended front."""
        data = self.data
        members = {record.number for record in data.front}
        dominated = [
            r for r in data.complete.records if r.number not in members and r.kind != "anchor"
        ]
        anchors = [record for record in data.anchors if record.state == "complete"]
        leading = [] if data.leading is None else [data.leading]
        edge = {"color": EDGE, "width": 1}
        star = {"color": VERMILLION, "size": 17, "symbol": "star"}
        ring = {"color": BLUE, "size": 11, "symbol": "circle-open"}
        few = len(data.front) <= MOST_BARS
        return [
            PointClass(
                "trial", self._thinned(dominated), {"color": GREY, "size": 6, "opacity": 0.6}
            ),
            PointClass("front", data.front, {"color": BLUE, "size": 8}, few),
            PointClass(
                "anchor",
                anchors,
                {"color": ORANGE, "size": 9, "symbol": "diamond", "line": edge},
                few,
            ),
            PointClass(
                "winner" if data.winner is not None else "best so far",
                leading,
                {**star, "line": {"color": "white", "width": 1}},
                True,
            ),
            *(
                [PointClass("recommended front", data.recommended, ring)]
                if data.by_estimates
                else []
            ),
        ]

    @property
    def layers(self) -> list[PointClass]:
        """The same in the order of drawing: anchors and the winner hide what is below them."""
        return [*self.classes[:2], *self.classes[4:], *self.classes[2:4]]

    @cached_property
    def ranges(self) -> list[list[float]]:
        """Limits of the axis of every objective."""
        return [self._range(objective.name) for objective in self.data.objectives]

    @cached_property
    def texts(self) -> dict[int, str]:
        """Trial -> hover text."""
        shown = itertools.chain.from_iterable(each.records for each in self.classes)
        return {record.number: hover(self.data, record) for record in shown}

    def trace(self, drawn: PointClass, axes: Mapping[str, int]) -> Figure:
        """Coordinates on the named axes, error bars and hover texts."""
        trace: Figure = {
            "name": drawn.name,
            "marker": drawn.marker,
            "mode": "markers",
            "text": [self.texts[record.number] for record in drawn.records],
            "customdata": [record.number for record in drawn.records],
            "hovertemplate": "%{text}<extra></extra>",
        }
        for axis, m in axes.items():
            name = self.data.objectives[m].name
            trace[axis] = [record.values[name] for record in drawn.records]
            errors = [_bar(record.errors.get(name)) for record in drawn.records]
            if drawn.bars and any(errors):
                trace[f"error_{axis}"] = {
                    "type": "data",
                    "array": errors,
                    "thickness": 1,
                    "width": 0,
                }
        return trace

    def values(self, records: Sequence[TrialSummary]) -> Array:
        """Values of trials in the user's directions, ``(records, objectives)``."""
        names = [objective.name for objective in self.data.objectives]
        rows = [[record.values[name] for name in names] for record in records]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))

    def beyond(self, records: Sequence[TrialSummary]) -> npt.NDArray[np.int64]:
        """Where trials lie beyond the axes: -1, 0 or 1, ``(records, objectives)``."""
        low, high = np.array(self.ranges).T
        values = self.values(records)
        return np.asarray((values > high).astype(np.int64) - (values < low))

    def axis(self, m: int) -> Figure:
        """The axis of an objective."""
        title = {"text": escape(heading(self.data.objectives[m]))}
        return {"title": title, "range": self.ranges[m]}

    def _range(self, name: str) -> list[float]:
        data = self.data
        core = [*data.front, *([] if data.leading is None else [data.leading])]
        searched = [r.values[name] for r in data.complete.records if r.kind != "anchor"]
        anchors = [r.values[name] for r in data.complete.records if r.kind == "anchor"]
        return list(focus_range([r.values[name] for r in core], searched, anchors))

    def _thinned(self, records: Sequence[TrialSummary]) -> Sequence[TrialSummary]:
        panels = math.comb(len(self.data.objectives), 2)
        most = self.most or (THINNED if panels > 1 else len(records))
        return records[:: -(-len(records) // most) or 1] if records else records


def _bar(error: float | None) -> float:
    return error if error is not None and math.isfinite(error) else 0.0
