"""Results as tables in the form of the papers, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from experiments.protocols.figures import Row
from experiments.protocols.models_file import Models
from experiments.protocols.protocol import Protocol
from experiments.protocols.running import Results

#: Heading and cell of a column.
Column = tuple[str, Callable[[Row], str]]

_MEGABYTE = 1e6


def results_table(protocol: Protocol, results: Results) -> str:
    """The table, then what was left out and what failed."""
    shown = columns(protocol, results)
    lines = [f"| {' | '.join(head for head, _ in shown)} |", "|---" * len(shown) + "|"]
    lines += [f"| {' | '.join(cell(row) for _, cell in shown)} |" for row in results.rows]
    for heading, reasons in (("Not run", results.left_out), ("Failed", results.failed)):
        if reasons:
            lines += ["", f"{heading}:", ""]
            lines += [f"- {label}: {reason}." for label, reason in reasons.items()]
    return "\n".join(lines)


def columns(protocol: Protocol, results: Results) -> list[Column]:
    """The columns that a protocol reports."""
    found: list[Column] = [("method", lambda row: row.label)]
    if protocol.subsets:
        found += [
            ("experts", lambda row: "" if row.experts is None else str(row.experts)),
            ("merges", lambda row: str(row.merges) if row.experts is not None else ""),
            ("held in, % of the expert", lambda row: _spread(row.normalised)),
            ("held out, % of the base", lambda row: _spread(row.held_out)),
        ]
    else:
        found += [(task, _of_task(task)) for task in results.tasks]
        found += [
            ("average", lambda row: percent(row.average)),
            ("% of the expert", lambda row: percent(row.normalised[0])),
        ]
    if "general" in protocol.reports:
        found.append(("change of general, %", lambda row: _signed(row.general)))
    return [*found, *(_COST if "cost" in protocol.reports else ())]


def _of_task(task: str) -> Callable[[Row], str]:
    return lambda row: percent(row.scores.get(task, math.nan))


def _seconds(part: str) -> Callable[[Row], str]:
    return lambda row: "" if row.seconds is None else f"{row.seconds[part]:.1f}"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / _MEGABYTE:.0f}"


_COST: tuple[Column, ...] = (
    ("coefficient", lambda row: row.coefficient),
    ("prepare, s", _seconds("prepare")),
    ("choose, s", _seconds("choose")),
    ("score, s", _seconds("score")),
    ("CPU, s", _seconds("processor")),
    ("peak, MB", lambda row: _megabytes(row.memory)),
)


def percent(value: float) -> str:
    """A share in percent; nothing where there is none."""
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:+.1f}"


def _spread(value: tuple[float, float]) -> str:
    middle, deviation = value
    more = "" if math.isnan(deviation) else f" ± {100 * deviation:.1f}"
    return percent(middle) + more


def description(protocol: Protocol) -> str:
    """What a protocol is: tasks, methods with their settings, and what is not there."""
    lines = [f"{protocol.title}: {protocol.paper}", f"settings from {protocol.settings}", ""]
    lines += [f"base: {protocol.base}", "tasks:"]
    for task, scored in protocol.tasks.items():
        expert = protocol.experts.get(task)
        lines.append(f"  {task}: {scored}" + ("" if expert is None else f"; expert {expert}"))
    lines.append("methods:")
    for method in protocol.methods:
        differs = f"; {method.differs}" if method.differs else ""
        lines.append(f"  {method.label}: {method.setting}{differs}")
    if protocol.exclude:
        lines.append(f"tensors that stay at the base: {protocol.exclude}")
    lines += [f"reports: {', '.join(protocol.reports)}", *protocol.differs]
    return "\n".join(lines)


def as_json(protocol: Protocol, models: Models, results: Results) -> dict[str, Any]:
    """Everything, with None for what is not known."""
    rows: Sequence[Any] = [_plain(asdict(row)) for row in results.rows]
    return {
        "protocol": protocol.name,
        "models": models.file.name,
        "base": models.file.base,
        "experts": models.file.experts,
        "tasks": list(results.tasks),
        "rows": rows,
        "not run": dict(results.left_out),
        "failed": dict(results.failed),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
