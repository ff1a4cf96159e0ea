"""Listings of the strategies, written from their declarations.

``mergesearch ls strategies`` prints :func:`strategy_row`; ``make docs`` writes docs/strategies.md.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from mergesearch.search.strategies.table import STRATEGIES, StrategyInfo

_OBJECTIVES = {
    "one": "one objective",
    "several": "several objectives",
    "any": "one objective or several",
}

_INTRODUCTION = """# Strategies

Written by `make docs` from the declarations in `search/strategies/`; `mergesearch ls
strategies` prints the same. `strategy: NAME` in a study file, or
`strategy: {name: NAME, option: value}`; `strategy: auto` chooses by this rule:

> RULE

TABLE
"""


def strategy_row(entry: StrategyInfo) -> dict[str, Any]:
    """A strategy as plain data, for listings."""
    return {
        "name": entry.name,
        "summary": entry.summary,
        "paper": entry.source,
        "when": entry.when,
        "objectives": _OBJECTIVES[entry.objectives],
        "dimensions": _dimensions(entry),
        "budget": entry.budget,
        "needs": _needs(entry),
        "options": {name: _default(parameter) for name, parameter in entry.options().items()},
        "refused_above": entry.most,
        "slow": entry.slow,
    }


def strategy_table() -> str:
    """A row for every strategy, those for one objective first."""
    entries = sorted(
        STRATEGIES.own.values(), key=lambda entry: [*_OBJECTIVES].index(entry.objectives)
    )
    rows = [
        f"| [`{e.name}`](#{e.name}) | {e.when} | {e.objectives} | {_dimensions(e)} | {e.budget} "
        f"| {_needs(e)} |"
        for e in entries
    ]
    head = "| strategy | use it | objectives | dimensions | trials | needs |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def page() -> str:
    """The text of docs/strategies.md."""
    from mergesearch.search.strategies import auto

    rule = (inspect.getdoc(auto) or "").split("\n\n", 1)[1].split(" Why these")[0]
    introduction = _INTRODUCTION.replace("RULE", " ".join(rule.split()))
    parts = [introduction.replace("TABLE", strategy_table())]
    for objectives, title in _OBJECTIVES.items():
        parts.append(f"## {title.capitalize()}\n")
        parts += [
            _section(entry) for entry in STRATEGIES.own.values() if entry.objectives == objectives
        ]
    return without_roles("\n".join(parts))


def write_pages(root: Path) -> None:
    """Write docs/strategies.md under the repository's root."""
    (root / "docs" / "strategies.md").write_text(page())


def without_roles(text: str) -> str:
    """Docstring markup as Markdown: roles and literals become code."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``(.+?)``", r"`\1`", text)


def _section(entry: StrategyInfo) -> str:
    row = strategy_row(entry)
    slow = f"\nMore than 50 ms of CPU: {row['slow']}.\n" if entry.slow else ""
    return (
        f"### {entry.name}\n\n{entry.summary[0].upper()}{entry.summary[1:]}. {entry.source}.\n\n"
        f"Use it {entry.when}. Dimensions: {row['dimensions']}; trials: {entry.budget}; "
        f"needs {row['needs']}.\n{slow}"
        f"{_options(entry)}"
    )


def _options(entry: StrategyInfo) -> str:
    meanings = described(inspect.getdoc(entry.load()) or "")
    rows = [
        f"| `{name}` | {_cell(parameter)} | {meanings.get(name, '')} |"
        for name, parameter in entry.options().items()
    ]
    if not rows:
        return ""
    return "\n".join(["\n| option | default | what it is |", "|---|---|---|", *rows, ""])


def described(doc: str) -> dict[str, str]:
    """Name of an argument -> its text, from a Google docstring."""
    texts: dict[str, str] = {}
    name = ""
    for line in doc.partition("Args:\n")[2].splitlines():
        match = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if match:
            name = match[1]
            texts |= dict.fromkeys(name.split(", "), match[2])
        elif name and line.startswith("        "):
            texts |= {key: f"{texts[key]} {line.strip()}" for key in name.split(", ")}
        else:
            name = ""
    return {key: text.replace("|", "\\|") for key, text in texts.items()}


def _dimensions(entry: StrategyInfo) -> str:
    low, high = entry.dims
    return f"{low} or more" if high is None else f"{low} to {high}"


def _needs(entry: StrategyInfo) -> str:
    words = {"items": "per-item scores", "gradient": "gradients", "proxy": "gradients of any loss"}
    needs = entry.load().needs
    return (
        ", ".join([*(word for need, word in words.items() if need in needs), *_space(entry)])
        or "nothing"
    )


def _space(entry: StrategyInfo) -> list[str]:
    kinds = {
        "segments": "a space of its own: fields with moving split points",
        "mixed": "`operator: stack`",
        "product": "`operator: lora_sparse`",
    }
    return [kinds[entry.space]] if entry.space in kinds else []


def _default(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return "required"
    return f"{default:.4g}" if isinstance(default, float) else str(default)


def _cell(parameter: inspect.Parameter) -> str:
    """The default in a table; the option's meaning tells what happens without one."""
    return "–" if parameter.default is None else _default(parameter)
