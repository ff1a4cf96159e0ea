"""What ``mergesearch check`` and ``mergesearch ls`` print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merging import MergesearchError
from merging.kernels import accumulation_dtype
from merging.operators import get_operator
from search.plan import Plan, recommended_trials
from spaces import Row


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The resolved study with its space, for ``--json``."""
    space = plan.space
    return {
        "study": plan.spec.to_dict(),
        "objectives": [vars(objective) for objective in plan.objectives],
        "anchors": [anchor.name for anchor in plan.anchors],
        "trials": trial_counts(plan),
        "memory": memory(plan),
        "space": {
            "title": space.title,
            "dimensions": len(space.names),
            "names": list(space.names),
            "lower": space.lower.tolist(),
            "upper": space.upper.tolist(),
            "start": space.start.tolist(),
            "groups": [_row(row) for row in space.table()],
        },
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "group": row.group,
        "tensors": list(row.tensors),
        "parameters": row.parameters,
        "coefficients": row.coefficients,
    }


def trial_counts(plan: Plan) -> dict[str, int]:
    """How the budget is spent."""
    return {
        "total": plan.spec.budget.trials,
        "anchors": len(plan.anchors),
        "search": plan.search_trials,
        "recommended": recommended_trials(plan.spec),
    }


def memory(plan: Plan) -> dict[str, int]:
    """Bytes: ``shared`` by the workers of a host, ``worker`` (merged weights) for each, ``preparing`` at most at once.

    Preparation writes what is shared to disk, one tensor after the other; its working set is the operator's number of
    copies of the largest tensor, in the accumulation dtype.
    """
    if plan.layout is None:
        return {"shared": 0, "worker": 0, "preparing": 0}
    width = 8 if accumulation_dtype(plan.layout) == "float64" else 4
    one, largest = plan.layout.size * width, max(spec.size for spec in plan.layout.tensors) * width
    copies = get_operator(plan.template.operator).copies(len(plan.template.experts))
    return {
        "shared": one * (1 + plan.template.field.directions),
        "worker": one,
        "preparing": math.ceil(copies * largest),
    }


def describe_plan(plan: Plan) -> list[str]:
    """The table for people."""
    space, counts, need = plan.space, trial_counts(plan), memory(plan)
    objectives = ", ".join(f"{o.name} ({o.direction})" for o in plan.objectives)
    trials = f"{counts['anchors']} anchors, {counts['search']} search, {counts['recommended']} recommendation"
    box = f"[{space.lower.min():g}, {space.upper.max():g}], start {space.start.mean():.3g} (mean)"
    lines = [
        f"study       {plan.spec.name}",
        f"operator    {plan.spec.operator.name}, {len(plan.spec.experts)} experts",
        *([f"special     {_policies(plan)}"] if plan.template.special else []),
        f"objectives  {objectives}",
        f"strategy    {plan.spec.strategy.name}, {counts['total']} trials: {trials}",
        f"anchors     {', '.join(anchor.name for anchor in plan.anchors) or 'none'}",
        f"space       {space.title}: {len(space.names)} dimensions in {box}",
    ]
    if plan.layout is not None:
        lines.append(
            f"memory      {_size(need['shared'])} shared by the workers of a host, {_size(need['worker'])} per worker, "
            f"at most {_size(need['preparing'])} while preparing"
        )
    return [*lines, "", *group_lines(space.table())]


def _policies(plan: Plan) -> str:
    return ", ".join(f"{name} {value}" for name, value in plan.template.special)


def group_lines(rows: tuple[Row, ...]) -> list[str]:
    """One line per group: tensors, parameters, coefficients."""
    width = max([len(row.group) for row in rows] + [5])
    lines = [f"{'group':<{width}}  {'tensors':>7}  {'parameters':>12}  {'coefficients':>12}  first tensor"]
    for row in rows:
        first = row.tensors[0] if row.tensors else ""
        figures = f"{len(row.tensors):>7}  {row.parameters:>12,}  {row.coefficients:>12}"
        lines.append(f"{row.group:<{width}}  {figures}  {first}".rstrip())
    total = sum(row.parameters for row in rows), sum(row.coefficients for row in rows)
    lines.append(f"{'total':<{width}}  {sum(len(r.tensors) for r in rows):>7}  {total[0]:>12,}  {total[1]:>12}")
    return lines


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def listing(what: str) -> list[dict[str, Any]]:
    """Rows of ``mergesearch ls``: a name and what there is to say."""
    if what == "strategies":
        from search.strategies import STRATEGIES

        return [{"name": s.name, "summary": f"{s.summary} ({s.source})"} for s in STRATEGIES.values()]
    if what == "operators":
        from merging.operators import OPERATORS
        from merging.operators.pages import operator_row

        return [operator_row(operator) for operator in OPERATORS.values()]
    if what == "evaluators":
        from evaluators.spec import EVALUATORS

        return [{"name": name, "summary": summary} for name, summary in EVALUATORS.items()]
    return [_run_row(path.parent) for path in sorted(Path("runs").glob("*/study.yaml"))]


def listing_lines(what: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows for people; operators take two lines each."""
    width = max((len(row["name"]) for row in rows), default=0)
    if what != "operators":
        return [f"{row['name']:<{width}}  {row['summary']}" for row in rows]
    return [line for row in rows for line in _operator_lines(row, width)]


def _operator_lines(row: Mapping[str, Any], width: int) -> list[str]:
    options = "".join(f", {name} {value}" for name, value in row["defaults"].items())
    indent = " " * (width + 2)
    return [
        f"{row['name']:<{width}}  {row['summary']} ({row['paper']})",
        f"{indent}needs {', '.join(row['needs'])}; default coefficient {row['coefficient']}{options}",
    ]


def _run_row(folder: Path) -> dict[str, str]:
    from search.run import open_run

    try:
        run = open_run(folder)
    except MergesearchError as error:
        return {"name": str(folder), "summary": f"cannot be read: {error}"}
    verdict = run.verdict
    state = "unfinished" if verdict is None else f"winner: trial {verdict.winner}"
    return {"name": str(folder), "summary": f"{len(run.log.records)} trials, {state}"}
