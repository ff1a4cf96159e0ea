"""What ``mergesearch ls strategies``, docs/strategies.md and the table of the README say, from the
declarations.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from mergesearch.search.strategies.table import STRATEGIES, StrategyInfo

#: Between these lines of the README stands the table.
START = "<!-- strategies: written by `make docs` -->"
STOP = "<!-- strategies: end -->"

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


def readme_table() -> str:
    """Method, when to use it, needs: a row for every strategy, those for one objective first."""
    entries = sorted(STRATEGIES.values(), key=lambda entry: [*_OBJECTIVES].index(entry.objectives))
    rows = [
        f"| `{e.name}` | {e.when} | {_OBJECTIVES[e.objectives]}, {_needs_in_words(e)} |"
        for e in entries
    ]
    return "\n".join(["| method | when to use it | needs |", "|---|---|---|", *rows])


def page() -> str:
    """docs/strategies.md."""
    from mergesearch.search.strategies import auto

    rule = (inspect.getdoc(auto) or "").split("\n\n", 1)[1].split(" Why these")[0]
    parts = [_INTRODUCTION.replace("RULE", " ".join(rule.split()))]
    for objectives, title in _OBJECTIVES.items():
        parts.append(f"## {title.capitalize()}\n")
        parts += [
            _section(entry) for entry in STRATEGIES.values() if entry.objectives == objectives
        ]
    return "\n".join(parts)


def write_pages(root: Path) -> None:
    """Write docs/strategies.md, and the table into the README."""
    (root / "docs" / "strategies.md").write_text(page())
    readme = root / "README.md"
    readme.write_text(with_table(readme.read_text()))


def with_table(text: str) -> str:
    """The README with the table as it should be."""
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(STOP)}", re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n{readme_table()}\n{STOP}", text)


def _section(entry: StrategyInfo) -> str:
    row = strategy_row(entry)
    slow = f"\nMore than 50 ms of CPU: {row['slow']}.\n" if entry.slow else ""
    return (
        f"### {entry.name}\n\n{entry.summary[0].upper()}{entry.summary[1:]}. {entry.source}.\n\n"
        f"When: {entry.when}. {row['dimensions']} dimensions; budget in trials: {entry.budget}; "
        f"needs {row['needs']}.\n{slow}"
        f"{_options(entry)}"
    )


def _options(entry: StrategyInfo) -> str:
    meanings = described(inspect.getdoc(entry.load()) or "")
    rows = [
        f"| `{name}` | {_default(parameter)} | {meanings.get(name, '')} |"
        for name, parameter in entry.options().items()
    ]
    return (
        "\n".join(["\n| option | default | what it is |", "|---|---|---|", *rows, ""])
        if rows
        else ""
    )


def described(doc: str) -> dict[str, str]:
    """Name of an argument -> its text, from a Google docstring."""
    found: dict[str, str] = {}
    name = ""
    for line in doc.partition("Args:\n")[2].splitlines():
        match = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if match:
            name = match[1]
            found |= dict.fromkeys(name.split(", "), match[2])
        elif name and line.startswith("        "):
            found |= {key: f"{found[key]} {line.strip()}" for key in name.split(", ")}
        else:
            name = ""
    return {key: text.replace("|", "\\|") for key, text in found.items()}


def _dimensions(entry: StrategyInfo) -> str:
    low, high = entry.dims
    return f"{low} or more" if high is None else f"{low} to {high}"


def _needs(entry: StrategyInfo) -> str:
    words = {"items": "per-item scores", "gradient": "gradients"}
    needs = entry.load().needs
    return (
        ", ".join([*(word for need, word in words.items() if need in needs), *_space(entry)])
        or "nothing"
    )


def _needs_in_words(entry: StrategyInfo) -> str:
    needs = _needs(entry)
    facts = [
        f"{_dimensions(entry)} dimensions",
        f"budget {entry.budget}",
        *([needs] if needs != "nothing" else []),
    ]
    return ", ".join(facts)


def _space(entry: StrategyInfo) -> list[str]:
    kinds = {
        "segments": "a space of its own: fields with moving split points",
        "mixed": "`operator: stack`",
        "product": "`operator: lora_sparse`",
    }
    return [kinds[entry.space]] if entry.space in kinds else []


def _default(parameter: inspect.Parameter) -> str:
    return "required" if parameter.default is inspect.Parameter.empty else str(parameter.default)
