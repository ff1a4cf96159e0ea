"""From a study file to everything a study needs, with every check that can be made before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evaluators import Evaluator, Objective
from evaluators.spec import build_evaluator
from merging import Field, InputError, Layout, Recipe, Source
from merging.checkpoint import Checkpoint
from merging.family import align_family
from merging.operators import Operator, Options, get_operator
from search.anchors import Anchor, default_anchors
from search.strategies import get_entry
from search.study_file import StudySpec
from spaces import Space
from spaces.spec import build_space


@dataclass(frozen=True)
class Plan:
    """A checked study, ready to run.

    Attributes:
        spec: The resolved study file.
        template: The study's recipe with coefficients 0; every trial is it with another field.
        layout: The flat index, or None for analytic problems without weights.
        space: The box that is searched.
        evaluator: Not opened; only its declarations are used in the driver.
        anchors: Known merges to measure first.
        weights: Relative importance of the objectives, summing to 1, ``(objectives,)``.
    """

    spec: StudySpec
    template: Recipe
    layout: Layout | None
    space: Space
    evaluator: Evaluator
    anchors: tuple[Anchor, ...]
    weights: npt.NDArray[np.float64]

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What is measured."""
        return self.evaluator.objectives

    @property
    def search_trials(self) -> int:
        """Trials left for the strategy's own suggestions."""
        return self.spec.budget.trials - len(self.anchors) - recommended_trials(self.spec)


def recommended_trials(spec: StudySpec) -> int:
    """Trials kept back for the strategy's own recommendation."""
    return int(get_entry(spec.strategy.name).load().recommends)


def plan_study(spec: StudySpec, fingerprints: Sequence[str] = ()) -> Plan:
    """Check a study against its checkpoints (headers only) and data.

    Args:
        spec: The resolved study file.
        fingerprints: Content hashes of base and experts, once their weights have been read.

    Raises:
        InputError: In one line, for anything that is wrong.
    """
    evaluator = build_evaluator(spec.evaluators, Path())
    operator = get_operator(spec.operator.name)
    template, layout = _template(spec, operator, fingerprints)
    options = template.options
    if layout is None and evaluator.model_class is not None:
        raise InputError("base: required key is missing: the evaluators need a model (and experts to merge)")
    evaluator.check()
    experts = max(len(spec.experts), 1)
    space = build_space(
        spec.space,
        template,
        layout,
        default_bounds=operator.bounds(experts, options),
        default_start=operator.default(experts, options),
    )
    anchors = default_anchors(template, layout, space, operator) if spec.anchors == "default" else ()
    plan = Plan(spec, template, layout, space, evaluator, anchors, _weights(spec, evaluator.objectives))
    _check_capabilities(plan)
    return plan


def _template(spec: StudySpec, operator: Operator, fingerprints: Sequence[str]) -> tuple[Recipe, Layout | None]:
    """The study's recipe with coefficients 0, and the layout of its checkpoints."""
    if spec.base is None:
        options = operator.complete(spec.operator.options)
        return _analytic(operator, options), None
    base = Checkpoint.open(spec.base, "base")
    experts = [Checkpoint.open(path, name) for name, path in spec.experts.items()]
    family = align_family(base, experts, spec.special)
    layout = family.layout
    options = operator.check(layout, len(experts), spec.operator.options)
    family.check(operator)
    prints = fingerprints or [""] * (1 + len(experts))
    recipe = Recipe(
        base=Source("base", spec.base, prints[0]),
        experts=tuple(Source(e.name, e.path, p) for e, p in zip(experts, prints[1:], strict=True)),
        operator=operator.name,
        field=Field.constant(layout.size, np.zeros(operator.directions(len(experts), options))),
        hyperparameters=tuple(sorted(options.items())),
        layout=layout.digest,
        special=spec.special.choices,
    )
    return recipe, layout


def _analytic(operator: Operator, options: Options) -> Recipe:
    """The recipe of a problem without weights."""
    return Recipe(Source("", ""), (), operator.name, Field.constant(1, [0.0]), tuple(sorted(options.items())))


def _weights(spec: StudySpec, objectives: Sequence[Objective]) -> npt.NDArray[np.float64]:
    given = spec.selection.weights
    names = [objective.name for objective in objectives]
    if given is None:
        return np.full(len(names), 1 / len(names))
    odd = sorted(set(given) ^ set(names))
    if odd:
        raise InputError(f"selection.weights: expected a weight for each of {names}, missing or unknown: {odd}")
    weights = np.array([given[name] for name in names])
    return np.asarray(weights / weights.sum())


def _check_capabilities(plan: Plan) -> None:
    entry = get_entry(plan.spec.strategy.name)
    lacking = sorted(entry.load().needs - plan.evaluator.provides)
    if lacking:
        raise InputError(
            f"strategy.name: {entry.name} needs {lacking} from the evaluators, which provide "
            f"{sorted(plan.evaluator.provides)}; choose another strategy or evaluator"
        )
    if plan.search_trials < 1:
        least = plan.spec.budget.trials - plan.search_trials + 1
        raise InputError(
            f"budget.trials: expected at least {least} ({len(plan.anchors)} anchors, 1 search trial, "
            f"{recommended_trials(plan.spec)} recommendation), received {plan.spec.budget.trials}"
        )
