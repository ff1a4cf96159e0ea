"""One self-contained HTML page for a study: tables, and figures drawn by the plotly.js inside it.

The page loads nothing. Its content security policy allows exactly its own scripts, by their hashes,
so that even a name that slipped through escaping could not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mergesearch.evaluators import SPLITS
from mergesearch.search.grammar import counted
from mergesearch.search.report.costs import busy_share, failures, timings
from mergesearch.search.report.data import ReportData, label
from mergesearch.search.report.gains import anchor_intervals
from mergesearch.search.report.headline import export_command, sentences
from mergesearch.search.report.masking import without_secrets
from mergesearch.search.report.page_style import DRAW, STYLE
from mergesearch.search.report.plotly_figures import Figure, draw_figures
from mergesearch.search.report.tables import MISSING, cell, heading, result_table
from mergesearch.search.report.wording import interval, plus_minus, rounded

#: Rows of the table of front members; the rest is in report.json.
LISTED = 100


def render(data: ReportData) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    figures = draw_figures(data)
    scripts = [get_plotlyjs(), DRAW] if figures else []
    allowed = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; "
    policy += f"style-src 'unsafe-inline'; script-src {allowed}"
    code = "".join(f"<script>{script}</script>\n" for script in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(data.study)} – mergesearch</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{_body(data, figures)}</main>\n{code}</body>\n</html>\n"
    )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _body(data: ReportData, figures: Mapping[str, Figure]) -> str:
    several = len(data.objectives) > 1
    whose = "the winner" if data.winner is not None else "the best trial so far"
    sections = [
        ("Result", _results(data)),
        ("Winner against every anchor", _against_anchors(data)),
        ("Progress", _figure("progress", figures)),
        ("Front", _figure("front", figures)),
        (f"Coefficients of {whose}", _figure("coefficients", figures)),
        ("Front members" if several else "Best trials", _members(data)),
        ("Trials and time", _trials(data) + _times(data)),
        ("Failures", _failures(data)),
        ("Space", _space(data)),
        ("Study", _yaml(data.resolved)),
        ("Environment", _yaml(data.fingerprint)),
    ]
    shown = (
        f"<section>\n<h2>{escape(title)}</h2>\n{html}</section>\n"
        for title, html in sections
        if html
    )
    return _headline(data) + "".join(shown)


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
    return f'<pre class="command">{escape(export_command(data, data.leading.number))}</pre>\n'


def _table(head: Sequence[str], rows: Sequence[str], numeric: Sequence[int] = ()) -> str:
    """A table from header texts and ready ``<tr>`` rows."""
    cells = "".join(
        f"<th{' class=n' if i in numeric else ''}>{escape(t)}</th>" for i, t in enumerate(head)
    )
    body = "\n".join(rows)
    table = f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table>\n{table}</table></div>\n'


def _cells(texts: Sequence[str], numeric: Sequence[int] = ()) -> str:
    return "".join(
        f"<td{' class=n' if i in numeric else ''}>{escape(text)}</td>"
        for i, text in enumerate(texts)
    )


def _results(data: ReportData) -> str:
    """Every anchor and the winner; one line per objective inside each."""
    rows = []
    count = len(data.objectives)
    for row in result_table(data):
        style = "winner" if row.winner or row.leading else "anchor" if row.best_anchor else ""
        for index, objective in enumerate(data.objectives):
            figures = [heading(objective), *(cell(row, split, objective) for split in SPLITS)]
            line = _cells(figures, (1, 2, 3))
            if index == 0:
                span = f' rowspan="{count}"' if count > 1 else ""
                first = (
                    f"<td{span} class=n>{row.trial}</td><td{span} "
                    f"class=name>{escape(row.name)}</td>"
                )
                line = f"{first}{line}<td{span} class=name>{escape(row.marks)}</td>"
            rows.append(f'<tr class="{style}{" first" if index == 0 else ""}">{line}</tr>')
    note = (
        "<p class=note>Values ± standard error over items. The search saw the search items "
        "alone; the winner was chosen on the validation items and measured once on the test "
        "items.</p>\n"
    )
    return _table(["trial", "", "objective", *SPLITS, ""], rows, (0, 3, 4, 5)) + note


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
        texts = [each.objective, each.anchor, gain, span, paired, each.verdict]
        rows.append(f"<tr>{_cells(texts, (2, 3))}</tr>")
    note = (
        "<p class=note>How much better the winner is than each anchor on test items. All 95 % "
        "intervals hold together; a gain is shown only where the winner is better than every "
        "anchor.</p>\n"
    )
    head = ["objective", "anchor", "improvement", "95 % interval", "", "winner is"]
    return _table(head, rows, (2, 3)) + note if rows else ""


def _figure(name: str, figures: Mapping[str, Figure]) -> str:
    if name not in figures:
        return ""
    # "<" would let a name close the script element.
    text = json.dumps(figures[name], allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div class="figure" id="{name}"></div>\n<script type="application/json" '
        f'data-for="{name}">{text}</script>\n'
    )


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
            f"<tr>{_cells([str(record.number), *values], numeric)}<td>{named}</td>{command}</tr>"
        )
    if not rows:
        return ""
    left = len(data.recommended) - LISTED
    verb = "is" if left == 1 else "are"
    more = f"<p class=note>{left} more {verb} in report.json.</p>\n" if left > 0 else ""
    numeric = range(len(data.objectives) + len(estimated) + 1)
    names = [*map(heading, data.objectives), *(f"estimated {o.name}" for o in estimated)]
    return _table(["trial", *names, "", "export"], rows, numeric) + more + _observed_only(data)


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


def _trials(data: ReportData) -> str:
    states = {
        state: sum(r.state == state for r in data.records)
        for state in ("complete", "failed", "running")
    }
    kinds = {
        kind: sum(r.kind == kind for r in data.records)
        for kind in ("anchor", "search", "recommended")
    }
    listed = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    trials = counted(len(data.records), "trial")
    facts = [f"{trials}: {listed}" if listed else trials]
    facts.append(", ".join(f"{count} {kind}" for kind, count in kinds.items() if count))
    facts.append(f"wall time {duration(data.wall_seconds)}")
    share = busy_share(data)
    if share is not None:
        facts.append(f"workers were busy {share:.0%} of their time")
    per_worker = ", ".join(f"{name}: {count}" for name, count in data.trials_per_worker.items())
    facts.append(f"trials per worker: {per_worker}" if per_worker else "")
    return "<ul>\n" + "".join(f"<li>{escape(fact)}</li>\n" for fact in facts if fact) + "</ul>\n"


def _times(data: ReportData) -> str:
    finished = max(sum(record.state != "running" for record in data.records), 1)
    rows = []
    for timing in timings(data):
        per_trial = f"{timing.seconds / finished:.3g}"
        texts = [timing.phase, f"{timing.seconds:.1f}", f"{timing.share:.1%}", per_trial]
        bar = f'<td><span class="bar" style="width:{timing.share * 10:.2f}em"></span></td>'
        rows.append(f"<tr>{_cells(texts, (1, 2, 3))}{bar}</tr>")
    return _table(["phase", "seconds", "share", "s / trial", ""], rows, (1, 2, 3))


def duration(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _failures(data: ReportData) -> str:
    groups = failures(data)
    rows = []
    for group in groups:
        numbers = ", ".join(map(str, group.trials[:8])) + (", …" if len(group.trials) > 8 else "")
        rows.append(
            f"<tr>{_cells([group.kind, str(len(group.trials)), group.message, numbers], (1,))}</tr>"
        )
    return _table(["kind", "count", "first message", "trials"], rows, (1,)) if rows else ""


def _space(data: ReportData) -> str:
    if not data.names:
        return ""
    rows = [
        f"<tr>{_cells([name, f'{low:.4g}', f'{high:.4g}'], (1, 2))}</tr>"
        for name, low, high in zip(data.names, data.lower, data.upper, strict=True)
    ]
    table = _table(["dimension", "lower", "upper"], rows, (1, 2))
    return (
        f"<details><summary>{counted(len(data.names), 'dimension')}</summary>\n{table}</details>\n"
    )


def _yaml(values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    import yaml

    plain = json.loads(json.dumps(without_secrets(values), default=str))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return f"<pre>{escape(text)}</pre>\n"
