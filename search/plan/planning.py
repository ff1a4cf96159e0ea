"""Plans a study: everything that can be built and checked before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Evaluator, Objective
from mergesearch.evaluators.routing.routed import RoutedEvaluator
from mergesearch.evaluators.spec.evaluators import build_evaluator
from mergesearch.evaluators.spec.loadable import check_loadable
from mergesearch.evaluators.spec.model_kinds import check_model_kind
from mergesearch.merging import Field, InputError, Recipe, Source
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.extensions.references import is_reference
from mergesearch.merging.family.family import ModelFamily, align_family
from mergesearch.merging.models.calibration_experts import check_experts, check_model
from mergesearch.merging.operators import Operator, Options, get_operator
from mergesearch.search.plan.anchors import Anchor, default_anchors
from mergesearch.search.plan.checks import (
    check_capabilities,
    check_fidelity,
    check_gradients,
    check_references,
)
from mergesearch.search.plan.heads import check_class_numbers, check_heads
from mergesearch.search.plan.mixture import (
    is_mixture_study,
    mixture_anchors,
    mixture_template,
    space_of_mixture,
)
from mergesearch.search.plan.plan import Plan, unanchored_trials
from mergesearch.search.plan.sections import check_sections
from mergesearch.search.plan.short_list import survey_anchors, survey_of
from mergesearch.search.plan.spaces import parameter_space, study_space
from mergesearch.search.plan.survey import Choice, Survey
from mergesearch.search.spec.auto_operator import AUTO_OPERATOR
from mergesearch.search.spec.sections import StrategySection, StudySpec
from mergesearch.search.spec.study_file import find_references
from mergesearch.search.strategies.auto import choose
from mergesearch.search.strategies.table import AUTO
from mergesearch.spaces import DifferentiableSpace, Space
from mergesearch.spaces.bits_space import BitsSpace
from mergesearch.spaces.mixture_space import MixtureSpace

#: Parameters of a merge above which ``auto`` follows no gradients.
LARGEST_FOLLOWED = 1_000_000_000


def plan_study(
    spec: StudySpec,
    fingerprints: Sequence[str] = (),
    arenas: Path | None = None,
    choice: Choice | None = None,
) -> Plan:
    """Check a study against its checkpoints (headers only) and data.

    Args:
        spec: The resolved study file.
        fingerprints: Content hashes of base and experts, once their weights have been read.
        arenas: Where prepared weights are; spaces that need weights to decode a point open them for
            the first one.
        choice: The operators that a study with ``operator: auto`` goes on from, once they have been
            measured; before, the first of its list stand in for them.

    Raises:
        InputError: In one line, if anything is wrong.
    """
    find_references(spec)
    check_sections(spec)
    evaluator = build_evaluator(spec.evaluators, Path(), spec.selection.lend)
    automatic = spec.operator.name == AUTO_OPERATOR
    mixture = is_mixture_study(spec)
    operator = get_operator("task_arithmetic" if automatic or mixture else spec.operator.name)
    options = {} if automatic else spec.operator.options
    base = None if spec.base is None else open_checkpoint(spec.base, "base")
    family: ModelFamily | None
    if mixture and base is not None:
        template, family = mixture_template(spec, base, fingerprints)
    else:
        template, family = _template(spec, base, operator, options, fingerprints)
    layout = None if family is None else family.layout
    if layout is None and evaluator.model_class is not None:
        raise InputError(
            "base: required key is missing: the evaluators need a model (and experts to merge)"
        )
    if base is not None and (family is None or family.heads is None):
        config = base.config if family is None else family.base.config
        check_model_kind(evaluator.model_class, config, spec.evaluators)
        check_loadable(evaluator.model_class, base, spec.evaluators)
    evaluator.check()
    check_heads(spec, None if family is None else family.heads, evaluator)
    check_class_numbers(family, evaluator)
    if layout is not None and is_reference(evaluator.model_class or ""):
        from mergesearch.merging.models.loading import check_builder

        check_builder(template.base.path, evaluator.model_class or "")
    survey = _survey(spec, template, family, evaluator, choice) if automatic else None
    if survey is not None and layout is not None:
        template = survey.blend(layout)
    if isinstance(evaluator, RoutedEvaluator):
        _refuse_routed(evaluator, mixture)
        evaluator.check_recipe(template)
        space: Space = parameter_space(spec, template, evaluator)
    elif mixture:
        space = space_of_mixture(spec, template, arenas)
    else:
        space = study_space(spec, template, layout, operator, arenas, survey)
    if isinstance(space, BitsSpace):
        template = replace(template, bits=space.template.bits)  # what anchors are rounded to
    anchors: tuple[Anchor, ...] = ()
    if survey is not None and layout is not None:
        anchors = survey_anchors(survey, layout)
    elif spec.anchors == "default" and isinstance(space, MixtureSpace):
        anchors = mixture_anchors(spec, space)
    elif spec.anchors == "default":
        anchors = default_anchors(template, layout, space, operator)
    strategy = _strategy(spec, evaluator, space, template, len(anchors))
    weights = _weights(spec, evaluator.objectives)
    plan = Plan(spec, template, family, space, evaluator, anchors, weights, strategy, survey=survey)
    check_references(plan)
    check_capabilities(plan)
    check_fidelity(plan)
    return plan


def _refuse_routed(evaluator: RoutedEvaluator, mixture: bool) -> None:
    """Refuse merges for each input of one mixture.

    Raises:
        InputError: If a study asks for them.
    """
    if mixture:
        raise InputError(
            f"evaluators: expected one that scores a checkpoint, for the experts of one mixture, "
            f"received {evaluator.fixed['method']}, which merges for each input"
        )


def _strategy(
    spec: StudySpec, evaluator: Evaluator, space: Space, template: Recipe, anchors: int
) -> StrategySection:
    """The study's strategy, or the one that ``auto`` chooses."""
    if spec.strategy.name != AUTO:
        return spec.strategy
    left = unanchored_trials(spec, evaluator, anchors)
    gradients = _offers_gradients(spec, evaluator, space, template)
    return StrategySection(
        name=choose(space.lower.size, len(evaluator.objectives), left, gradients=gradients)
    )


def _offers_gradients(
    spec: StudySpec, evaluator: Evaluator, space: Space, template: Recipe
) -> bool:
    """Whether a strategy that follows gradients of a model would be accepted.

    Problems without a model stand in for what has no gradients, and for a large model the memory of
    a backward pass is not taken for granted.
    """
    if evaluator.model_class is None or not isinstance(space, DifferentiableSpace):
        return False
    if template.field.size > LARGEST_FOLLOWED:
        return False
    try:
        check_gradients(StrategySection(name="hybrid"), spec, template)
    except InputError:
        return False
    return bool(evaluator.differentiable or evaluator.proxies)


def _survey(
    spec: StudySpec,
    template: Recipe,
    family: ModelFamily | None,
    evaluator: Evaluator,
    choice: Choice | None,
) -> Survey:
    """The operators that a study with ``operator: auto`` measures, or has measured."""
    if family is None or isinstance(evaluator, RoutedEvaluator):
        raise InputError(
            "operator: expected the name of one, received auto, which is for merges of base and "
            "experts into a checkpoint; name an operator"
        )
    survey = survey_of(spec, template, family, evaluator)
    return survey if choice is None else replace(survey, choice=choice, decided=True)


def _template(
    spec: StudySpec,
    base: Checkpoint | None,
    operator: Operator,
    given: Options,
    fingerprints: Sequence[str],
) -> tuple[Recipe, ModelFamily | None]:
    """The study's recipe with coefficients 0, and its checkpoints."""
    if base is None or spec.base is None:
        options = operator.complete(given)
        return _analytic(operator, options), None
    experts = [open_checkpoint(path, name) for name, path in spec.experts.items()]
    family = align_family(base, experts, spec.special)
    layout = family.layout
    options = operator.check(layout, len(experts), given)
    check_experts(options, [expert.name for expert in experts])
    check_model(options, base)
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
    return recipe, family


def _analytic(operator: Operator, options: Options) -> Recipe:
    """The recipe of a problem without weights."""
    return Recipe(
        Source("", ""), (), operator.name, Field.constant(1, [0.0]), tuple(sorted(options.items()))
    )


def _weights(spec: StudySpec, objectives: Sequence[Objective]) -> npt.NDArray[np.float64]:
    """Relative importance of the objectives, summing to 1, ``(objectives,)``."""
    given = spec.selection.weights
    names = [objective.name for objective in objectives]
    if given is None:
        return np.full(len(names), 1 / len(names))
    odd = sorted(set(given) ^ set(names))
    if odd:
        raise InputError(
            f"selection.weights: expected a weight for each of {names}, missing or unknown: {odd}"
        )
    weights = np.array([given[name] for name in names])
    return np.asarray(weights / weights.sum())
