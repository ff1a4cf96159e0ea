"""What ``mergesearch check`` and ``mergesearch ls`` print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch.merging import MergesearchError
from mergesearch.merging.kernels.dispatch import accumulation_dtype
from mergesearch.merging.operators import get_operator
from mergesearch.search.plan.plan import Plan
from mergesearch.search.report.summary import TRANSDUCTIVE
from mergesearch.search.strategies.table import AUTO
from mergesearch.search.study.early_stopping import stages_of
from mergesearch.spaces import ParameterSpace, Row


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The resolved study with its space, for ``--json``."""
    space = plan.space
    return {
        "study": plan.spec.to_dict(),
        "objectives": [vars(objective) for objective in plan.objectives],
        "transductive": plan.evaluator.transductive,
        "constraints": list(plan.evaluator.constraints),
        "references": sorted(plan.evaluator.references()),
        "stages": list(stages_of(plan.spec.fidelity, plan.evaluator.size("search"))),
        "warnings": list(plan.warnings),
        "anchors": [anchor.name for anchor in plan.anchors],
        "routing": dict(plan.space.fixed) if isinstance(plan.space, ParameterSpace) else None,
        "strategy": plan.strategy.name,
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


def trial_counts(plan: Plan) -> dict[str, int | None]:
    """How the budget is spent, in trials on all items; None where a time limits them."""
    anchors = len(plan.anchors)
    search = plan.search_trials
    recommended = plan.recommended_trials
    total = None if search is None else anchors + search + recommended
    return {"total": total, "anchors": anchors, "search": search, "recommended": recommended}


def _budget_line(plan: Plan) -> str:
    """The strategy, and what it may spend."""
    counts = trial_counts(plan)
    budget = plan.spec.budget
    name = plan.strategy.name + (" (chosen by auto)" if plan.spec.strategy.name == AUTO else "")
    limits = (
        [f"{budget.evaluations:,} evaluations of items"] if budget.evaluations is not None else []
    )
    limits += [f"{budget.seconds:g} seconds"] if budget.seconds is not None else []
    limits += [f"{budget.worker_hours:g} worker-hours"] if budget.worker_hours is not None else []
    search = (
        "as many as fit in the search" if counts["search"] is None else f"{counts['search']} search"
    )
    trials = f"{counts['anchors']} anchors, {search}, {counts['recommended']} recommendation"
    total = "" if counts["total"] is None else f"{counts['total']} trials"
    return f"{name}, {', at most '.join(filter(None, [total, *limits]))}: {trials}"


def memory(plan: Plan) -> dict[str, int]:
    """Bytes: ``shared`` by the workers of a host, ``worker`` for each of them, ``preparing`` at
    most at once.

    Preparation writes what is shared to disk, one tensor after the other; its working set is the
    operator's number of copies of the largest tensor, in the accumulation dtype.
    """
    if plan.layout is None:
        return {"shared": 0, "worker": 0, "preparing": 0}
    width = 8 if accumulation_dtype(plan.layout) == "float64" else 4
    one = plan.layout.size * width
    largest = max(spec.size for spec in plan.layout.tensors) * width
    copies = get_operator(plan.template.operator).copies(len(plan.template.experts))
    return {
        "shared": one * (1 + plan.template.field.directions),
        # Merged weights and, where gradients are followed, as much again for theirs.
        "worker": one * (1 if plan.differentiable_space is None else 2),
        "preparing": math.ceil(copies * largest),
    }


def describe_plan(plan: Plan) -> list[str]:
    """The table for people."""
    space = plan.space
    need = memory(plan)
    references = plan.evaluator.references()
    objectives = ", ".join(f"{o.name} ({o.direction})" for o in plan.objectives)
    box = f"[{space.lower.min():g}, {space.upper.max():g}], start {space.start.mean():.3g} (mean)"
    lines = [
        f"study       {plan.spec.name}",
        f"operator    {plan.spec.operator.name}, {len(plan.spec.experts)} experts",
        *([f"special     {_policies(plan)}"] if plan.template.special else []),
        *_routing_lines(plan),
        f"objectives  {objectives}",
        f"strategy    {_budget_line(plan)}",
        *([f"items       {TRANSDUCTIVE}"] if plan.evaluator.transductive else []),
        *_fidelity_lines(plan),
        *(
            [f"bounds      {', '.join(plan.evaluator.constraints)}"]
            if plan.evaluator.constraints
            else []
        ),
        *([f"references  {', '.join(sorted(references))}, measured first"] if references else []),
        f"anchors     {', '.join(anchor.name for anchor in plan.anchors) or 'none'}",
        f"space       {space.title}: {len(space.names)} dimensions in {box}",
    ]
    if plan.layout is not None:
        lines.append(
            f"memory      {_size(need['shared'])} shared by the workers of a host, "
            f"{_size(need['worker'])} per worker, "
            f"at most {_size(need['preparing'])} while preparing"
        )
    warnings = [f"warning     {line}" for line in plan.warnings]
    return [*lines, *warnings, "", *group_lines(space.table())]


def _fidelity_lines(plan: Plan) -> list[str]:
    """When trials may be stopped, if they may."""
    section = plan.spec.fidelity
    items = plan.evaluator.size("search")
    stages = stages_of(section, items)
    if not stages:
        return []
    looks = f"looks after {', '.join(map(str, stages))}"
    return [f"fidelity    {section.rule} over {items} items, {looks}; estimate {section.estimate}"]


def _routing_lines(plan: Plan) -> list[str]:
    """What is merged for each input, and the parameters, for studies of such merges."""
    if not isinstance(plan.space, ParameterSpace):
        return []
    fixed = dict(plan.space.fixed)
    space = plan.space
    ranges = zip(space.names, space.lower, space.upper, space.start, strict=True)
    listed = ", ".join(
        f"{name} [{low:g}, {high:g}] from {start:g}" for name, low, high, start in ranges
    )
    return [
        f"routing     {fixed['method']}: not a single checkpoint, merged for each {fixed['per']}",
        f"parameters  {listed}",
    ]


def _policies(plan: Plan) -> str:
    return ", ".join(f"{name} {value}" for name, value in plan.template.special)


def group_lines(rows: tuple[Row, ...]) -> list[str]:
    """One line per group: tensors, parameters, coefficients."""
    width = max([len(row.group) for row in rows] + [5])
    lines = [
        (
            f"{'group':<{width}}  {'tensors':>7}  {'parameters':>12}  {'coefficients':>12}  first "
            "tensor"
        )
    ]
    for row in rows:
        first = row.tensors[0] if row.tensors else ""
        figures = f"{len(row.tensors):>7}  {row.parameters:>12,}  {row.coefficients:>12}"
        lines.append(f"{row.group:<{width}}  {figures}  {first}".rstrip())
    total = sum(row.parameters for row in rows), sum(row.coefficients for row in rows)
    lines.append(
        f"{'total':<{width}}  {sum(len(r.tensors) for r in rows):>7}  {total[0]:>12,}  "
        f"{total[1]:>12}"
    )
    return lines


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def listing(what: str) -> list[dict[str, Any]]:
    """Rows of ``mergesearch ls``: a name and what there is to say."""
    if what == "strategies":
        from mergesearch.search.strategies.pages import strategy_row
        from mergesearch.search.strategies.table import STRATEGIES

        return [strategy_row(entry) for entry in STRATEGIES.values()]
    if what == "operators":
        from mergesearch.merging.operators import OPERATORS
        from mergesearch.merging.operators.pages import operator_row

        return [operator_row(operator) for operator in OPERATORS.values()]
    if what == "evaluators":
        from mergesearch.evaluators.spec.evaluators import EVALUATORS

        return [{"name": name, "summary": summary} for name, summary in EVALUATORS.items()]
    return [_run_row(path.parent) for path in sorted(Path("runs").glob("*/study.yaml"))]


def listing_lines(what: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows for people; operators and strategies take several lines each."""
    width = max((len(row["name"]) for row in rows), default=0)
    if what == "operators":
        return [line for row in rows for line in _operator_lines(row, width)]
    if what == "strategies":
        return [line for row in rows for line in _strategy_lines(row, width)]
    return [f"{row['name']:<{width}}  {row['summary']}" for row in rows]


def _strategy_lines(row: Mapping[str, Any], width: int) -> list[str]:
    indent = " " * (width + 2)
    facts = (
        f"{row['objectives']}; {row['dimensions']} dimensions; budget {row['budget']}; needs "
        f"{row['needs']}"
    )
    return [
        f"{row['name']:<{width}}  {row['summary']} ({row['paper']})",
        f"{indent}{row['when']}; {facts}",
        (
            f"{indent}options: "
            f"{', '.join(f'{name} {value}' for name, value in row['options'].items()) or 'none'}"
        ),
        *([f"{indent}more than 50 ms of CPU: {row['slow']}"] if row["slow"] else []),
    ]


def _operator_lines(row: Mapping[str, Any], width: int) -> list[str]:
    options = "".join(f", {name} {value}" for name, value in row["defaults"].items())
    indent = " " * (width + 2)
    return [
        f"{row['name']:<{width}}  {row['summary']} ({row['paper']})",
        (
            f"{indent}needs {', '.join(row['needs'])}; default coefficient "
            f"{row['coefficient']}{options}"
        ),
    ]


def _run_row(folder: Path) -> dict[str, str]:
    from mergesearch.search.runs.opened import open_run

    try:
        run = open_run(folder)
    except MergesearchError as error:
        return {"name": str(folder), "summary": f"cannot be read: {error}"}
    verdict = run.verdict
    state = "unfinished" if verdict is None else f"winner: trial {verdict.winner}"
    return {"name": str(folder), "summary": f"{len(run.log.records)} trials, {state}"}
