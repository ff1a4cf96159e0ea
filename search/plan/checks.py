"""Refuses studies whose strategy, evaluators and rules do not fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from mergesearch.merging import InputError, Recipe
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.models.calibration_experts import check_experts, check_model
from mergesearch.search.fidelity.rules import rung_stages
from mergesearch.search.front import Normaliser
from mergesearch.search.grammar import counted
from mergesearch.search.plan.plan import Plan
from mergesearch.search.spec.sections import StrategySection, StudySpec
from mergesearch.search.strategies.table import AUTO, build_strategy, check_options
from mergesearch.spaces import DifferentiableSpace


def check_references(plan: Plan) -> None:
    """Refuse objectives and reference scores that name models which the study does not have.

    Raises:
        InputError: In one line.
    """
    known = (
        ["base", *(f"expert {expert.name}" for expert in plan.template.experts)]
        if plan.layout is not None
        else []
    )
    odd = sorted(plan.evaluator.references() - set(known))
    if odd:
        raise InputError(
            f"evaluators: objectives are relative to {odd[0]!r}: expected one of {known}; write "
            "`experts: {domain: expert}` where they have other names"
        )
    unknown = sorted(set(plan.spec.reference_scores) - {anchor.name for anchor in plan.anchors})
    if unknown:
        names = [anchor.name for anchor in plan.anchors]
        raise InputError(
            f"reference_scores.{unknown[0]}: expected one of the anchors {names}, received "
            f"{unknown[0]!r}"
        )


def check_gradients(strategy: StrategySection, spec: StudySpec, template: Recipe) -> None:
    """Refuse merges that are not smooth in their coefficients, before weights are read.

    Raises:
        InputError: In one line.
    """
    name = strategy.name
    special = spec.special
    if spec.workers.gpus > 1:
        raise InputError(
            f"workers.gpus: expected at most 1 with strategy {name}, which follows gradients, "
            f"received {spec.workers.gpus:g}; a model on several GPUs gives none"
        )
    if special.batch_norm in ("merge", "recalibrate"):
        raise InputError(
            f"special.batch_norm: expected base or refuse with strategy {name}, as no gradient "
            f"reaches running statistics, received {special.batch_norm}"
        )
    if strategy.options.get("oracle") == "cosine" and special.scalars == "log":
        raise InputError(
            "strategy.oracle: expected exact with special.scalars: log, received cosine; change "
            "one of them"
        )
    if template.options.get("mode") == "live":
        raise InputError(
            f"operator.mode: expected frozen with strategy {name}, received live: signs that are "
            "elected anew make merges jump"
        )


def check_capabilities(plan: Plan) -> None:
    """Refuse a strategy that the evaluators, the space or the budget cannot serve.

    Raises:
        InputError: In one line.
    """
    entry = plan.entry
    evaluator = plan.evaluator
    provided = evaluator.provides | (
        {"proxy"} if evaluator.differentiable or evaluator.proxies else set()
    )
    lacking = sorted(plan.needs - provided)
    if lacking:
        raise InputError(
            f"strategy.name: {entry.name} needs {lacking} from the evaluators, which provide "
            f"{sorted(plan.evaluator.provides)}; choose another strategy or evaluator"
        )
    if {"gradient", "proxy"} & plan.needs and not isinstance(plan.space, DifferentiableSpace):
        raise InputError(
            f"strategy.name: expected a space whose merges have gradients with {entry.name}, "
            f"received {plan.space.title}; choose cma_es, or leave space.bits out"
        )
    if plan.differentiable_space is not None:
        check_gradients(plan.strategy, plan.spec, plan.template)
    left = plan.search_trials
    if left is not None and left < 1:
        _refuse_budget(plan)
    # Strategies refuse dimensions, objectives and spaces themselves, on what is known so far.
    count = len(plan.objectives)
    problem = plan.problem(
        Normaliser(np.zeros(count), np.ones(count)), left or 1000, plan.space.start
    )
    build_strategy(
        entry.name, check_options(entry.name, plan.strategy.options), problem, plan.spec.seed
    )


def check_objectives(plan: Plan) -> None:
    """Refuse one objective for a strategy that searches for a front; asked of new studies alone.

    Raises:
        InputError: In one line.
    """
    if plan.entry.objectives == "several" and len(plan.objectives) < 2:
        raise InputError(
            f"strategy.name: expected two objectives or more with {plan.entry.name}, which looks "
            f"for a front, received {plan.objectives[0].name!r} alone; add an objective, or choose "
            "quadratic, cma_es or auto"
        )


def budget_warning(plan: Plan) -> list[str]:
    """That a study has fewer trials than its strategy needs, as a list of one line or none.

    One that ``auto`` chose is not held against the budget by which it was chosen.
    """
    left = plan.search_trials
    if left is None or plan.spec.strategy.name == AUTO:
        return []
    least = plan.entry.least(len(plan.space.names), len(plan.template.experts))
    if left >= least:
        return []
    trials = least + len(plan.anchors) + plan.recommended_trials
    line = (
        f"budget: {counted(left, 'search trial')} with strategy {plan.entry.name}, which needs "
        f"{plan.entry.budget}: raise budget.trials to {trials}, or choose auto"
    )
    return [line]


def _refuse_budget(plan: Plan) -> NoReturn:
    """Say how much a study with one search trial needs."""
    need = len(plan.anchors) + 1 + plan.recommended_trials
    parts = (
        f"{counted(len(plan.anchors), 'anchor')}, 1 search trial, "
        f"{counted(plan.recommended_trials, 'recommendation')}"
    )
    budget = plan.spec.budget
    if budget.trials is not None and budget.trials < need:
        raise InputError(
            f"budget.trials: expected at least {need} ({parts}), received {budget.trials}"
        )
    each = plan.evaluator.cost("search")
    raise InputError(
        f"budget.evaluations: expected at least {need * each} ({parts}, {each} evaluations "
        f"each), received {budget.evaluations}"
    )


def check_fidelity(plan: Plan) -> None:
    """Refuse rules that the evaluators cannot serve.

    Raises:
        InputError: In one line.
    """
    section = plan.spec.fidelity
    items = plan.evaluator.size("search")
    if section.rule == "full":
        return
    where = f"fidelity.rule: {section.rule}"
    if "items" not in plan.evaluator.provides or not items:
        raise InputError(
            f"{where}: expected evaluators with item scores, received some without; choose full"
        )
    if "items" in plan.needs:
        raise InputError(
            f"{where}: expected full with strategy {plan.entry.name}, which needs the scores of "
            "all items"
        )
    if section.min_items >= items:
        raise InputError(
            f"fidelity.min_items: expected fewer than the {items} search items, received "
            f"{section.min_items}"
        )
    odd = [
        objective.name
        for objective in plan.objectives
        if objective.name not in plan.evaluator.additive
    ]
    if odd and (section.rule in ("race", "subset") or section.estimate.endswith("irt")):
        raise InputError(
            f"{where}: expected objectives that are means over items, received {odd[0]!r}; choose "
            "halving or hyperband with estimate: difference"
        )
    _check_order(plan)
    if section.rule in ("halving", "hyperband") and not rung_stages(
        items, section.min_items, section.eta
    ):
        raise InputError(
            f"fidelity.min_items: expected at most {items // section.eta} for a stage below the "
            f"{items} search items, received {section.min_items}"
        )


def _check_order(plan: Plan) -> None:
    """Refuse an order of items that the rule, the evaluators or the estimate cannot use."""
    section = plan.spec.fidelity
    if section.order == "representative" and (
        section.rule != "subset" or not plan.evaluator.selects
    ):
        raise InputError(
            "fidelity.order: representative: expected rule subset and one evaluator that scores "
            f"any of its items, received {section.rule} and "
            f"{', '.join(e.kind for e in plan.spec.evaluators)}; set balanced"
        )
    if (section.order == "representative") != (
        section.estimate == "representative"
    ) and section.estimate in (
        "representative",
        "difference",
    ):
        raise InputError(
            "fidelity.estimate: expected representative, mean or an IRT with order: "
            "representative, and not representative with balanced, "
            f"received {section.estimate} with {section.order}"
        )


def check_calibration(recipe: Recipe) -> None:
    """Refuse a recipe whose calibration does not fit its base and experts, as ``check`` does.

    Raises:
        InputError: In one line.
        CheckpointError: If the base cannot be opened.
    """
    options = dict(recipe.hyperparameters)
    given = options.get("calibration")
    if not isinstance(given, Mapping) or not {"data", "model_class", "inputs"} <= given.keys():
        return  # none, or one that is refused for what it lacks
    check_experts(options, [expert.name for expert in recipe.experts])
    check_model(options, open_checkpoint(recipe.base.path, recipe.base.name))
