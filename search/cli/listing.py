"""Describes catalogues: the output of ``mergesearch ls``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mergesearch.merging.extensions.table import Table

T = TypeVar("T")

#: Numbers with more digits than a list should show.
_LONG_NUMBER = re.compile(r"\d+\.\d{6,}")


def listing(what: str) -> list[dict[str, Any]]:
    """Rows of ``mergesearch ls``, each with a name and its facts.

    A plug-in's has its package too; that of one that cannot be used only the reason, as
    ``problem``.
    """
    if what == "strategies":
        from mergesearch.search.strategies.pages import strategy_row
        from mergesearch.search.strategies.table import STRATEGIES

        return _rows(STRATEGIES, strategy_row)
    if what == "operators":
        from mergesearch.merging.mixture.operators import MIXTURE_OPERATORS, mixture_row
        from mergesearch.merging.operators import OPERATORS
        from mergesearch.merging.operators.pages import operator_row

        smaller = [mixture_row(operator) for operator in MIXTURE_OPERATORS.values()]
        return [*_rows(OPERATORS, operator_row), *smaller]
    if what == "evaluators":
        from mergesearch.evaluators.spec.evaluators import SECTIONS, summary_of

        return _rows(SECTIONS, summary_of)
    if what == "spaces":
        from mergesearch.spaces.spec import SPACE_KINDS, kind_row

        return _rows(SPACE_KINDS, kind_row)
    from mergesearch.search.runs.listed import list_runs

    return [row.to_dict() for row in list_runs(Path("runs"))]


def _rows(table: Table[T], describe: Callable[[T], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each member of a table, and for each plug-in that cannot be used."""
    problems = table.problems()
    rows = [describe(member) for member in table.own.values()]
    for name in table:
        plugin = None if name in problems else table.plugin(name)
        if plugin is not None:
            rows.append(describe(table[name]) | {"plugin": plugin.origin})
    return [*rows, *({"name": name, "problem": text} for name, text in problems.items())]


def listing_lines(what: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as text; operators and strategies take several lines each."""
    width = max((len(row["name"]) for row in rows), default=0)
    lines = {"operators": _operator_lines, "strategies": _strategy_lines}.get(what, _plain_lines)
    return [line for row in rows for line in _lines(row, width, lines)]


def _lines(
    row: Mapping[str, Any], width: int, lines: Callable[[Mapping[str, Any], int], list[str]]
) -> list[str]:
    """The lines of a row, with the package of a plug-in, or why it cannot be used."""
    if "problem" in row:
        return [f"{row['name']:<{width}}  cannot be used: {row['problem']}"]
    plugin = [f"{' ' * (width + 2)}plug-in of {row['plugin']}"] if "plugin" in row else []
    return [*lines(row, width), *plugin]


def _plain_lines(row: Mapping[str, Any], width: int) -> list[str]:
    return [f"{row['name']:<{width}}  {row['summary']}"]


def _strategy_lines(row: Mapping[str, Any], width: int) -> list[str]:
    indent = " " * (width + 2)
    facts = (
        f"{row['objectives']}; {row['dimensions']} dimensions; budget {row['budget']}; needs "
        f"{row['needs']}"
    )
    slow = [f"{indent}more than 50 ms of CPU: {row['slow']}"] if row["slow"] else []
    return [
        f"{row['name']:<{width}}  {row['summary']} ({row['paper']})",
        f"{indent}{row['when']}; {facts}",
        f"{indent}options: {_options(row['options']) or 'none'}",
        *slow,
    ]


def _operator_lines(row: Mapping[str, Any], width: int) -> list[str]:
    options = _options(row["defaults"])
    default = f"default coefficient {row['coefficient']}" + (f", {options}" if options else "")
    indent = " " * (width + 2)
    when = [f"{indent}{row['when']}"] if "when" in row else []
    return [
        f"{row['name']:<{width}}  {row['summary']} ({row['paper']})",
        *when,
        f"{indent}needs {', '.join(row['needs'])}; {default}",
    ]


def _options(defaults: Mapping[str, Any]) -> str:
    """Names of options and their defaults, long numbers with four digits."""
    return ", ".join(
        f"{name} {_LONG_NUMBER.sub(lambda match: f'{float(match[0]):.4g}', str(value))}"
        for name, value in defaults.items()
    )
