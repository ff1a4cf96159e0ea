"""The page of a study: tables, and figures drawn by the plotly.js inside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from mergesearch.evaluators import SPLITS
from mergesearch.search.grammar import counted
from mergesearch.search.report.coefficients import with_kept
from mergesearch.search.report.costs import failures
from mergesearch.search.report.data import ReportData, label
from mergesearch.search.report.gains import anchor_intervals
from mergesearch.search.report.headline import export_command, sentences
from mergesearch.search.report.masking import without_secrets
from mergesearch.search.report.page.cost_section import cost_section
from mergesearch.search.report.page.elements import cells, document, figure, section, table
from mergesearch.search.report.page.panel import panel
from mergesearch.search.report.plotly_figures import Figure, draw_figures
from mergesearch.search.report.tables import MISSING, cell, heading, result_table
from mergesearch.search.report.wording import interval, plus_minus, rounded

#: Rows of the table of front members; the rest is in report.json.
LISTED = 100


def render(data: ReportData) -> str:
    """The whole page."""
    data = with_kept(data)
    figures = draw_figures(data)
    return document(data.study, _body(data, figures), figures=bool(figures))


def _body(data: ReportData, figures: Mapping[str, Figure]) -> str:
    several = len(data.objectives) > 1
    whose = "the winner" if data.winner is not None else "the best trial so far"
    heat = figure("coefficients", figures, f"coefficients of {whose}, by block")
    sections = [
        (f"Coefficients of {whose}", heat),
        ("Front members" if several else "Best trials", _members(data)),
        ("Cost", cost_section(data)),
        ("Failures", _failures(data)),
        ("Left untouched by the operator", _untouched(data)),
        ("Lineage of the experts", _lineages(data)),
        ("Space", _space(data)),
        ("Study", _yaml(data.resolved)),
        ("Environment", _yaml(data.fingerprint)),
    ]
    return (
        _headline(data)
        + section("Result", _results(data))
        + section("Winner against every anchor", _against_anchors(data))
        + _explored(data, figures)
        + "".join(section(title, html) for title, html in sections)
    )


def _headline(data: ReportData) -> str:
    status = "finished" if data.verdict is not None else "unfinished"
    lines = "".join(f"<p>{_with_code(line)}</p>\n" for line in sentences(data))
    return (
        f'<header>\n<h1>{escape(data.study)} <span class="chip {status}">{status}</span></h1>\n'
        f'<div class="headline">\n{lines}</div>\n{_export(data)}</header>\n'
    )


def _with_code(line: str) -> str:
    """A sentence as HTML, with what stands in backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(line))


def _export(data: ReportData) -> str:
    if data.leading is None:
        return ""
    command = escape(export_command(data, data.leading.number))
    return f'<pre class="command" tabindex=0>{command}</pre>\n'


def _results(data: ReportData) -> str:
    """Every anchor and the winner; one line per objective inside each."""
    rows = []
    count = len(data.objectives)
    for row in result_table(data):
        style = "winner" if row.winner or row.leading else "anchor" if row.best_anchor else ""
        for index, objective in enumerate(data.objectives):
            line = f"<td class=objective>{escape(heading(objective))}</td>" + "".join(
                f'<td class=n data-label="{split}">{escape(cell(row, split, objective))}</td>'
                for split in SPLITS
            )
            if index == 0:
                span = f' rowspan="{count}"' if count > 1 else ""
                first = (
                    f"<td{span} class=n>{row.trial}</td><td{span} "
                    f"class=name>{escape(row.name)}</td>"
                )
                line = f'{first}{line}<td{span} class="name marks">{escape(row.marks)}</td>'
            rows.append(f'<tr class="{style}{" first" if index == 0 else ""}">{line}</tr>')
    note = (
        "<p class=note>Values ± standard error over items. The search saw the search items "
        "alone; the winner was chosen on the validation items and measured once on the test "
        "items.</p>\n"
    )
    head = ["trial", "", "objective", *SPLITS, ""]
    return f'<div class="results">{table(head, rows, (0, 3, 4, 5), name="results")}</div>\n{note}'


def _against_anchors(data: ReportData) -> str:
    """The simultaneous intervals, one line for each objective and anchor."""
    rows = []
    for each in anchor_intervals(data):
        span = (
            MISSING
            if each.low is None or each.high is None
            else interval(each.low, each.high, each.error)
        )
        gain = rounded(each.improvement, each.error, "+")
        paired = "paired" if each.paired else "unpaired"
        anchor = each.anchor if each.kept else f"{each.anchor} (misses a bound)"
        texts = [each.objective, anchor, gain, span, paired, each.verdict]
        rows.append(f"<tr>{cells(texts, (2, 3))}</tr>")
    note = (
        "<p class=note>How much better the winner is than each anchor on test items. All 95 % "
        "intervals hold together; a gain is shown only where the winner is better than every "
        "anchor.</p>\n"
    )
    head = ["objective", "anchor", "improvement", "95 % interval", "", "winner is"]
    return table(head, rows, (2, 3), name="winner against anchors") + note if rows else ""


def _explored(data: ReportData, figures: Mapping[str, Figure]) -> str:
    """The figures of trials, and beside them the panel that shows one trial."""
    if not figures:
        return ""
    drawn = {
        "Front": figure("front", figures, "figure of the front"),
        "Pairs of objectives": figure("pairs", figures, "figures of all pairs of objectives"),
        "Progress": figure("progress", figures, "figure of the progress"),
    }
    sections = "".join(section(title, html) for title, html in drawn.items())
    return f'<div class="explore">\n<div>\n{sections}</div>\n{panel(data)}</div>\n'


def _members(data: ReportData) -> str:
    rows = []
    estimates = {} if data.front_estimate is None else data.front_estimate.recommended
    estimated = data.objectives if estimates else ()
    for record in data.recommended[:LISTED]:
        values = [
            plus_minus(record.values[o.name], record.errors.get(o.name)) for o in data.objectives
        ]
        values += [f"{estimates[record.number][o.name]:.4g}" for o in estimated]
        numeric = range(len(values) + 1)
        command = f"<td><code>{escape(export_command(data, record.number))}</code></td>"
        named = escape(label(record) if record.name else record.kind)
        rows.append(
            f"<tr>{cells([str(record.number), *values], numeric)}<td>{named}</td>{command}</tr>"
        )
    if not rows:
        return ""
    left = len(data.recommended) - LISTED
    verb = "is" if left == 1 else "are"
    more = f"<p class=note>{left} more {verb} in report.json.</p>\n" if left > 0 else ""
    numeric = range(len(data.objectives) + len(estimated) + 1)
    names = [*map(heading, data.objectives), *(f"estimated {o.name}" for o in estimated)]
    listed = table(["trial", *names, "", "export"], rows, numeric, name="members")
    return listed + more + _observed_only(data)


def _observed_only(data: ReportData) -> str:
    """How members were chosen, and who is on the front by its own scores alone."""
    members = {record.number for record in data.recommended}
    if members == {record.number for record in data.front}:
        return ""
    left = [str(record.number) for record in data.front if record.number not in members]
    chosen = "Members are chosen by values that are estimated from all trials"
    if not left:
        return f"<p class=note>{chosen}.</p>\n"
    named = ", ".join(left[:LISTED]) + (", …" if len(left) > LISTED else "")
    return f"<p class=note>{chosen}; on the front by their own scores only: {named}.</p>\n"


def _lineages(data: ReportData) -> str:
    """Where the experts come from, as told from samples of their weights."""
    rows = []
    for lineage in data.lineages:
        figures = [
            MISSING if lineage[key] is None else f"{lineage[key]:.4f}"
            for key in ("cosine", "distance")
        ]
        texts = [lineage["expert"], lineage["kind"], *figures, lineage["finding"]]
        rows.append(f"<tr>{cells(texts, (2, 3))}</tr>")
    head = ["expert", "of the base", "cosine", "distance", ""]
    return table(head, rows, (2, 3), name="lineage") if rows else ""


def _untouched(data: ReportData) -> str:
    told = data.untouched[:1].upper() + data.untouched[1:]
    return f"<p>{escape(told)}.</p>\n" if told else ""


def _failures(data: ReportData) -> str:
    groups = failures(data)
    rows = []
    for group in groups:
        numbers = ", ".join(map(str, group.trials[:8])) + (", …" if len(group.trials) > 8 else "")
        rows.append(
            f"<tr>{cells([group.kind, str(len(group.trials)), group.message, numbers], (1,))}</tr>"
        )
    return (
        table(["kind", "count", "first message", "trials"], rows, (1,), name="failures")
        if rows
        else ""
    )


def _space(data: ReportData) -> str:
    if not data.names:
        return ""
    rows = [
        f"<tr>{cells([name, f'{low:.4g}', f'{high:.4g}'], (1, 2))}</tr>"
        for name, low, high in zip(data.names, data.lower, data.upper, strict=True)
    ]
    listed = table(["dimension", "lower", "upper"], rows, (1, 2), name="space")
    return (
        f"<details><summary>{counted(len(data.names), 'dimension')}</summary>\n{listed}</details>\n"
    )


def _yaml(values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    import yaml

    plain = json.loads(json.dumps(without_secrets(values), default=str))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return f"<pre tabindex=0>{escape(text)}</pre>\n"
