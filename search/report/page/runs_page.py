"""Several runs on one page: their fronts in one picture, and what `compare` prints."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mergesearch.search.report.data import ReportData
from mergesearch.search.report.page.elements import (
    cells,
    document,
    figure,
    scrolling,
    section,
    table,
)
from mergesearch.search.report.runs_compared import RunsCompared, compare_runs
from mergesearch.search.report.runs_figures import runs_figure
from mergesearch.search.report.tables import MISSING, heading
from mergesearch.search.report.wording import plus_minus


def runs_page(runs: Sequence[ReportData]) -> str:
    """The whole page.

    Raises:
        InputError: As :func:`mergesearch.search.report.runs_compared.compare_runs`.
    """
    compared = compare_runs(runs)
    drawn = runs_figure(runs, compared.objectives)
    figures = {} if drawn is None else {"runs": drawn}
    lines = "".join(f"<p>{escape(line)}</p>\n" for line in compared.sentences())
    content = (
        f"<header>\n<h1>{escape(', '.join(run.run for run in compared.runs))}</h1>\n</header>\n"
        + section("Winners", _winners(compared) + lines)
        + section("Fronts", figure("runs", figures, "figure of the fronts of all runs"))
        + section("What the studies differ in", _keys(compared))
    )
    return document("comparison", content, figures=bool(figures))


def _winners(compared: RunsCompared) -> str:
    names = [objective.name for objective in compared.objectives]
    rows = []
    for run in compared.runs:
        trial = run.name if run.finished or not run.name else f"{run.name} so far"
        values = [
            plus_minus(run.values[name], run.errors.get(name)) if run.values else MISSING
            for name in names
        ]
        texts = [run.run, trial or MISSING, str(run.trials), run.split or MISSING, *values]
        rows.append(f"<tr>{cells(texts, range(2, len(texts)))}</tr>")
    head = ["run", "winner", "trials", "items", *map(heading, compared.objectives)]
    return table(head, rows, range(4, len(head)), name="winners")


def _keys(compared: RunsCompared) -> str:
    first = compared.runs[0].run
    parts = []
    for run in compared.runs[1:]:
        told = "".join(f"{escape(key)}\n" for key in run.differs_in)
        what = f"<pre>{told}</pre>" if told else "<p>It is the same study.</p>"
        parts.append(
            f"<h3>{escape(run.run)}, against {escape(first)}</h3>\n"
            + (scrolling(what, f"keys of {run.run}") if told else what)
        )
    return "".join(parts)
