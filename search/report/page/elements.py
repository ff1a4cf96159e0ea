"""What HTML pages of reports are made of: the page around its content, tables, and figures.

A page loads nothing. Its content security policy allows exactly its own scripts, by their hashes,
so that even a name that slipped through escaping could not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape

from mergesearch.merging.foreign.shown import printable_json
from mergesearch.search.report.page.script import SCRIPT
from mergesearch.search.report.page.style import STYLE
from mergesearch.search.report.plotly_figures import Figure

#: Pixels that figures need at least; narrower windows scroll them in a box of their own.
COLUMN = 46
PANEL = 150


def document(title: str, content: str, *, figures: bool) -> str:
    """A whole page.

    Args:
        title: Of the window.
        content: HTML of the page.
        figures: Whether the content has figures, which need plotly.js.
    """
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), SCRIPT] if figures else []
    allowed = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; "
    policy += f"style-src 'unsafe-inline'; script-src {allowed}"
    code = "".join(f"<script>{script}</script>\n" for script in scripts)
    content = printable_json(content)
    title = printable_json(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} – mergesearch</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{content}</main>\n{code}</body>\n</html>\n"
    )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def section(title: str, content: str) -> str:
    """A section with its heading; nothing without content."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}</section>\n" if content else ""


def table(
    head: Sequence[str], rows: Sequence[str], numeric: Sequence[int] = (), *, name: str
) -> str:
    """A table from header texts and ready ``<tr>`` rows, in a box that scrolls.

    Args:
        head: Texts of the header.
        rows: Of the body.
        numeric: Columns of numbers.
        name: What screen readers call the box.
    """
    cells = "".join(
        f"<th{' class=n' if i in numeric else ''}>{escape(t)}</th>" for i, t in enumerate(head)
    )
    body = "\n".join(rows)
    return scrolling(
        f"<table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody></table>", name
    )


def scrolling(content: str, name: str) -> str:
    """A box that scrolls, also with the keyboard, where its content is too wide or too long."""
    return (
        f'<div class="scroll" tabindex=0 role=region aria-label="{escape(name)}">{content}</div>\n'
    )


def cells(texts: Sequence[str], numeric: Sequence[int] = ()) -> str:
    """The cells of a row of a table."""
    return "".join(
        f"<td{' class=n' if i in numeric else ''}>{escape(text)}</td>"
        for i, text in enumerate(texts)
    )


def as_script(content: str) -> str:
    """JSON text as it may stand in a script element: "<" would let a name close it."""
    return content.replace("<", "\\u003c")


def figure(name: str, figures: Mapping[str, Figure], about: str) -> str:
    """The place of a figure and what is drawn there; nothing where there is no such figure.

    Args:
        name: Of the figure.
        figures: Those of the page.
        about: What screen readers say of it.
    """
    if name not in figures:
        return ""
    text = json.dumps(figures[name], allow_nan=False, separators=(",", ":"))
    return scrolling(
        f'<div class="figure" id="{name}" style="min-width:{_least_width(figures[name])}px"></div>',
        about,
    ) + (f'<script type="application/json" data-for="{name}">{as_script(text)}</script>\n')


def _least_width(drawn: Figure) -> int:
    """Pixels below which panels or columns could not be read; 0 where any width will do."""
    panels = drawn["layout"].get("grid", {}).get("columns", 0)
    columns = max((len(t["x"]) for t in drawn["data"] if t["type"] == "heatmap"), default=0)
    return (panels * PANEL + 70 if panels > 2 else 0) or (columns * COLUMN + 140 if columns else 0)
