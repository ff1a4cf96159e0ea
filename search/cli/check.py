"""Describes plans: the output of ``mergesearch check``."""

from __future__ import annotations

import math
from typing import Any

from mergesearch.evaluators import SPLITS
from mergesearch.merging import InputError
from mergesearch.merging.alignment.spec import DONE
from mergesearch.merging.kernels.dispatch import accumulation_dtype
from mergesearch.merging.lineage.description import lineage_dict, lineage_line
from mergesearch.merging.lineage.relation import Lineage
from mergesearch.merging.operators import get_operator
from mergesearch.merging.resident.card_memory import weight_bytes
from mergesearch.search.grammar import counted
from mergesearch.search.plan.card_check import (
    check_cards,
    plan_for,
    plan_for_this_machine,
    plan_without_limit,
)
from mergesearch.search.plan.card_needs import settings_of
from mergesearch.search.plan.card_plan import CardPlan
from mergesearch.search.plan.card_report import breakdown, gigabytes, plan_lines, refusal, why
from mergesearch.search.plan.cards import parse_card, smallest_that_fits
from mergesearch.search.plan.checks import budget_warning
from mergesearch.search.plan.choices import choices_needed
from mergesearch.search.plan.gradient_cost import gradient_cost
from mergesearch.search.plan.heads import head_bytes, used_heads
from mergesearch.search.plan.known import passed_over
from mergesearch.search.plan.lineage import lineage_warnings
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.preparing import Preparing, preparing_line
from mergesearch.search.report.data import TRANSDUCTIVE
from mergesearch.search.runs.cost.study_cost import StudyCost
from mergesearch.search.runs.cost.told import cost_lines
from mergesearch.search.spec.code import used_plugins
from mergesearch.search.strategies.table import AUTO
from mergesearch.search.study.early_stopping import stages_of
from mergesearch.spaces import ParameterSpace, Row


def plan_dict(
    plan: Plan,
    cards: CardPlan | None = None,
    preparing: Preparing | None = None,
    lineages: tuple[Lineage, ...] = (),
    timed: StudyCost | str | None = None,
) -> dict[str, Any]:
    """The resolved study with its space, its cards and its preparation, for ``--json``."""
    space = plan.space
    return {
        "study": plan.spec.to_dict(),
        "objectives": [vars(objective) for objective in plan.objectives],
        "transductive": plan.evaluator.transductive,
        "items": {split: plan.evaluator.size(split) for split in SPLITS},
        "constraints": list(plan.evaluator.constraints),
        "references": sorted(plan.evaluator.references()),
        "stages": list(stages_of(plan.spec.fidelity, plan.evaluator.size("search"))),
        "plugins": [vars(plugin) for plugin in used_plugins(plan.spec)],
        "warnings": _warnings(plan, lineages),
        "lineage": [lineage_dict(lineage) for lineage in lineages],
        "untouched": None if (left := passed_over(plan)) is None else left.to_dict(),
        "operators": None if plan.survey is None else [vars(one) for one in plan.survey.listed],
        "anchors": [anchor.name for anchor in plan.anchors],
        "routing": dict(plan.space.fixed) if isinstance(plan.space, ParameterSpace) else None,
        "strategy": plan.strategy.name,
        "trials": trial_counts(plan),
        "choices": [vars(needed) for needed in choices_needed(plan)],
        "gradients": None if (cost := gradient_cost(plan)) is None else cost.to_dict(),
        "memory": memory(plan),
        "preparing": None if preparing is None else preparing.to_dict(),
        "cards": None if cards is None else {**cards.to_dict(), "why": why(cards)},
        "cost": timed.to_dict() if isinstance(timed, StudyCost) else timed,
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
    """The strategy and its budget."""
    counts = trial_counts(plan)
    budget = plan.spec.budget
    name = plan.strategy.name + (" (chosen by auto)" if plan.spec.strategy.name == AUTO else "")
    limits = (
        [f"{budget.evaluations:,} evaluations of items"] if budget.evaluations is not None else []
    )
    limits += [f"{budget.seconds:g} seconds"] if budget.seconds is not None else []
    limits += [f"{budget.worker_hours:g} worker-hours"] if budget.worker_hours is not None else []
    search = (
        "as many search trials as the budget allows"
        if counts["search"] is None
        else f"{counts['search']} search"
    )
    anchors = counted(len(plan.anchors), "anchor")
    recommended = counted(plan.recommended_trials, "recommendation")
    trials = f"{anchors}, {search}, {recommended}"
    total = "" if counts["total"] is None else counted(counts["total"], "trial")
    return f"{name}, {', at most '.join(filter(None, [total, *limits]))}: {trials}"


def memory(plan: Plan) -> dict[str, int]:
    """Bytes that a study needs.

    ``shared`` is shared by the workers of a host, ``worker`` is needed by each of them, and
    ``preparing`` is the most that the preparation needs at a time. Preparation writes the shared
    part to disk, one tensor after the other; it works on the operator's number of copies of the
    largest tensor, in the accumulation dtype.
    """
    family = plan.family
    if family is None:
        return {"shared": 0, "worker": 0, "preparing": 0}
    operator = get_operator(plan.template.operator)
    weights = weight_bytes(family, operator, plan.template.options, plan.spec.rows)
    width = 8 if accumulation_dtype(family.layout) == "float64" else 4
    largest = max(spec.size for spec in family.layout.tensors) * width
    copies = operator.copies(len(plan.template.experts))
    heads = head_bytes(family.heads, plan.evaluator, weights.itemsize)
    return {
        "shared": weights.base + weights.rows,
        # Merged weights and, where gradients are followed, as much again for theirs.
        "worker": weights.merged * (1 if plan.differentiable_space is None else 2) + heads,
        "preparing": math.ceil(copies * largest),
    }


def planned_cards(plan: Plan, card: str | None, count: int | None) -> CardPlan | None:
    """The cards that a study is checked for: those of ``--card``, else of this machine.

    Batches that are too large are refused for ``--card`` only; they are halved when a study runs.

    Returns:
        None where neither study nor command line asks for cards, or there are none here.

    Raises:
        InputError: If the study does not fit, with the settings that would.
    """
    if card is None:
        if count is not None:
            raise InputError("--count: expected --card beside it, received it alone")
        check_cards(plan)
        return plan_for_this_machine(plan)
    planned = plan_for(plan, parse_card(card), count or settings_of(plan).gpus)
    if planned is not None and not planned.fits:
        raise refusal(planned)
    return planned


def _card_lines(plan: Plan, cards: CardPlan | None) -> list[str]:
    """The plan of the cards; what one would need where GPUs are asked for and there are none."""
    if cards is not None:
        return [*plan_lines(cards), *([] if cards.fits else [f"warning     {refusal(cards)}"])]
    wanted = plan_without_limit(plan) if plan.spec.workers.gpus_each else None
    if wanted is None:
        return []
    name = smallest_that_fits(wanted.peak)
    known = "no known card has as much" if name is None else f"the smallest that fits is {name}"
    need = f"{gigabytes(wanted.peak)} on each ({breakdown(wanted.fullest)})"
    return [f"cards       none here; {need}: {known}; plan with --card"]


def describe_plan(
    plan: Plan,
    cards: CardPlan | None = None,
    preparing: Preparing | None = None,
    lineages: tuple[Lineage, ...] = (),
    cost: StudyCost | str | None = None,
) -> list[str]:
    """The lines of ``mergesearch check``: a line for each section, then the groups."""
    space = plan.space
    need = memory(plan)
    references = plan.evaluator.references()
    objectives = ", ".join(f"{o.name} ({o.direction})" for o in plan.objectives)
    box = f"[{space.lower.min():g}, {space.upper.max():g}], start {space.start.mean():.3g} (mean)"
    lines = [
        f"study       {plan.spec.name}",
        f"operator    {plan.spec.operator.name}, {_merged(plan)}",
        *_survey_lines(plan),
        *_untouched_lines(plan),
        *(f"lineage     {lineage_line(lineage)}" for lineage in lineages),
        *_align_lines(plan),
        *(f"plug-in     {plugin} {plugin.version}" for plugin in used_plugins(plan.spec)),
        *([f"special     {_policies(plan)}"] if _policies(plan) else []),
        *_head_lines(plan),
        *_routing_lines(plan),
        f"objectives  {objectives}",
        f"strategy    {_budget_line(plan)}",
        *_gradient_lines(plan),
        *_item_lines(plan),
        *(f"choices     {needed.line()}" for needed in choices_needed(plan)),
        *([f"items       {TRANSDUCTIVE}"] if plan.evaluator.transductive else []),
        *_fidelity_lines(plan),
        *([f"bounds      {', '.join(_bounds(plan))}"] if plan.evaluator.constraints else []),
        *([f"references  {', '.join(sorted(references))}, measured first"] if references else []),
        f"anchors     {', '.join(anchor.name for anchor in plan.anchors) or 'none'}",
        f"space       {space.title}: {counted(len(space.names), 'dimension')} in {box}",
    ]
    if plan.layout is not None:
        lines.append(
            f"memory      {_size(need['shared'])} shared by the workers of a host, "
            f"{_size(need['worker'])} per worker, "
            f"at most {_size(need['preparing'])} while preparing"
        )
    lines += [] if preparing is None else [preparing_line(preparing)]
    lines += _card_lines(plan, cards)
    lines += cost_lines(plan, cost)
    warnings = [f"warning     {line}" for line in _warnings(plan, lineages)]
    return [*lines, *warnings, "", *group_lines(space.table())]


def _gradient_lines(plan: Plan) -> list[str]:
    """The line of what gradient steps cost; none for strategies that take none at first."""
    cost = gradient_cost(plan)
    return [] if cost is None else [f"gradients   {cost.sentence}"]


def _warnings(plan: Plan, lineages: tuple[Lineage, ...]) -> list[str]:
    """What a user should know before the study runs, one line each."""
    return [*lineage_warnings(plan, lineages), *plan.warnings, *budget_warning(plan)]


def _bounds(plan: Plan) -> list[str]:
    """The bounds, each with how far it may be missed."""
    tolerances = getattr(plan.evaluator, "tolerances", {})
    return [
        f"{name} (tolerance {tolerances[name]})" if name in tolerances else name
        for name in plan.evaluator.constraints
    ]


def _head_lines(plan: Plan) -> list[str]:
    """The line with the heads that items are scored with; none where all tensors are shared."""
    used = used_heads(plan.heads, plan.evaluator)
    if not used:
        return []
    sizes = ", ".join(f"{name} ({head.size:,} parameters)" for name, head in used.items())
    return [f"heads       {sizes}; not merged, each task has its own"]


def _item_lines(plan: Plan) -> list[str]:
    """The line with the number of items of every split; none where there are no items."""
    if not plan.evaluator.size("search"):
        return []
    sizes = ", ".join(f"{plan.evaluator.size(split)} {split}" for split in SPLITS)
    lend = plan.spec.selection.lend
    lent = f" (the search has {lend:.0%} of the files' validation items)" if lend else ""
    return [f"items       {sizes}{lent}"]


def _untouched_lines(plan: Plan) -> list[str]:
    """The line of what the operator passes over; none where it follows its formula everywhere."""
    left = passed_over(plan)
    return [] if left is None or not left.sentence else [f"passed over {left.sentence}"]


def _survey_lines(plan: Plan) -> list[str]:
    """Which operators are measured, which are not, and why; no line where the study names one."""
    survey = plan.survey
    if survey is None:
        return []
    seconds = sum(one.seconds for one in survey.listed if not one.reason)
    left_out = [f"            not {one.name}: {one.reason}" for one in survey.listed if one.reason]
    about = f"prepared in about {seconds:.0f} s, without runs of the experts"
    measured = f"            measures {', '.join(survey.measured)} ({about})"
    return [f"{measured}; goes on from the best {survey.keep}", *left_out]


def _fidelity_lines(plan: Plan) -> list[str]:
    """The line that says after how many items trials may be stopped; none without a rule."""
    section = plan.spec.fidelity
    items = plan.evaluator.size("search")
    stages = stages_of(section, items)
    if not stages:
        return []
    looks = f"looks after {', '.join(map(str, stages))}"
    return [f"fidelity    {section.rule} over {items} items, {looks}; estimate {section.estimate}"]


def _merged(plan: Plan) -> str:
    """What is merged: so many experts, or those inside the base."""
    if plan.template.mixture:
        return "on the base's own experts"
    return counted(len(plan.spec.experts), "expert")


def _routing_lines(plan: Plan) -> list[str]:
    """The method and parameters of input-dependent merges; no line for other studies."""
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
    from mergesearch.merging.policies import choices_text

    return choices_text(tuple(one for one in plan.template.special if one[0] != "align"))


def _align_lines(plan: Plan) -> list[str]:
    """What brings each expert into the base's coordinates, and what that takes."""
    if plan.family is None:
        return []
    parameters = sum(tensor.size for tensor in plan.family.layout.tensors)
    return [
        f"align       {name}: {DONE[spec.method]} ({spec.method}); takes a model in fp32 "
        f"({_size(4 * parameters)}) while preparing, once"
        for name, spec in plan.spec.special.align.items()
    ]


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
    tensors = sum(len(row.tensors) for row in rows)
    parameters = sum(row.parameters for row in rows)
    coefficients = sum(row.coefficients for row in rows)
    total = f"{tensors:>7}  {parameters:>12,}  {coefficients:>12}"
    return [*lines, f"{'total':<{width}}  {total}"]


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
