"""From a study file to everything a study needs, with every check that can be made before weights are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluators import Evaluator, Objective
from evaluators.routed import RoutedEvaluator
from evaluators.spec import build_evaluator
from merging import Field, InputError, Layout, MergesearchError, Recipe, Source
from merging.checkpoint import Checkpoint
from merging.family import align_family
from merging.operators import Operator, Options, get_operator
from search.anchors import Anchor, default_anchors, reference_recipe
from search.front import Normaliser, signs
from search.stopping import check_fidelity
from search.strategies import AUTO, Entry, build_strategy, check_options, get_entry
from search.strategies.auto import choose
from search.strategy import Point, Problem, Told
from search.study_file import StrategySection, StudySpec
from spaces import DifferentiableSpace, ParameterSpace, Space, adapter_space, mixed_space, segment_space
from spaces.segment_space import arc_bounds
from spaces.spec import SpaceSpec, build_space


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
        strategy: The strategy; where the study says ``auto``, the one that the rule chose.
        begin: Where the search begins, if the study takes it from another run.
    """

    spec: StudySpec
    template: Recipe
    layout: Layout | None
    space: Space
    evaluator: Evaluator
    anchors: tuple[Anchor, ...]
    weights: npt.NDArray[np.float64]
    strategy: StrategySection
    begin: Point | None = None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What is measured."""
        return self.evaluator.objectives

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know of base and experts; one line each."""
        if self.layout is None:
            return ()
        sources = [self.template.base, *self.template.experts]
        return tuple(self.evaluator.warnings([source.path for source in sources]))

    @property
    def entry(self) -> Entry:
        """What is known of the strategy."""
        return get_entry(self.strategy.name)

    @property
    def differentiable_space(self) -> DifferentiableSpace | None:
        """The space, for workers of a strategy that follows gradients; None for others."""
        if "gradient" not in self.entry.load().needs:
            return None
        assert isinstance(self.space, DifferentiableSpace)
        return self.space

    @property
    def recommended_trials(self) -> int:
        """Trials kept back for the strategy's own recommendation."""
        return int(self.entry.load().recommends)

    @property
    def search_trials(self) -> int | None:
        """Trials on all items left for the strategy's own suggestions; None where only time limits them."""
        left = trials_of(self.spec, self.evaluator)
        return None if left is None else left - len(self.anchors) - self.recommended_trials

    def reference(self, name: str) -> Recipe:
        """The recipe of a model that objectives are relative to: ``base`` or ``expert NAME``."""
        assert self.layout is not None
        return reference_recipe(self.template, self.layout, name)

    def problem(self, normaliser: Normaliser, budget: int, start: Point, anchors: tuple[Told, ...] = ()) -> Problem:
        """What the strategy is told."""
        objectives = self.objectives
        return Problem(
            lower=self.space.lower,
            upper=self.space.upper,
            start=start,
            objectives=len(objectives),
            budget=budget,
            scale=normaliser.scale,
            weights=self.weights,
            anchors=anchors,
            signs=signs(objectives),
            names=tuple(objective.name for objective in objectives),
            items=self.evaluator.size("search") if "items" in self.evaluator.provides else 0,
            space=self.space,
            origin=self.space.start if self.begin is None else self.begin,
            differentiable=self.evaluator.differentiable,
        )


def trials_of(spec: StudySpec, evaluator: Evaluator) -> int | None:
    """Trials on all items that the budget holds, in trials or evaluations; None where it is a time."""
    limits = [] if spec.budget.trials is None else [spec.budget.trials]
    if spec.budget.evaluations is not None:
        limits.append(spec.budget.evaluations // evaluator.cost("search"))
    return min(limits, default=None)


def plan_study(spec: StudySpec, fingerprints: Sequence[str] = (), arenas: Path | None = None) -> Plan:
    """Check a study against its checkpoints (headers only) and data.

    Args:
        spec: The resolved study file.
        fingerprints: Content hashes of base and experts, once their weights have been read.
        arenas: Where arenas are; only spaces that need weights to read a point open them, when the first point is read.

    Raises:
        InputError: In one line, for anything that is wrong.
    """
    evaluator = build_evaluator(spec.evaluators, Path())
    operator = get_operator(spec.operator.name)
    template, layout = _template(spec, operator, fingerprints)
    if layout is None and evaluator.model_class is not None:
        raise InputError("base: required key is missing: the evaluators need a model (and experts to merge)")
    evaluator.check()
    if isinstance(evaluator, RoutedEvaluator):
        evaluator.check_recipe(template)
        space: Space = _parameter_space(spec, template, evaluator)
    else:
        space = _space(spec, template, layout, operator, arenas)
    anchors = default_anchors(template, layout, space, operator) if spec.anchors == "default" else ()
    strategy = _strategy(spec, evaluator, space, len(anchors))
    weights = _weights(spec, evaluator.objectives)
    plan = Plan(spec, template, layout, space, evaluator, anchors, weights, strategy)
    _check_references(plan)
    _check_capabilities(plan)
    check_fidelity(plan)
    return plan


def _strategy(spec: StudySpec, evaluator: Evaluator, space: Space, anchors: int) -> StrategySection:
    """The study's strategy, or the one that the rule chooses."""
    if spec.strategy.name != AUTO:
        return spec.strategy
    trials = trials_of(spec, evaluator)
    left = None if trials is None else max(trials - anchors, 0)
    return StrategySection(name=choose(space.lower.size, len(evaluator.objectives), left))


def _space(spec: StudySpec, template: Recipe, layout: Layout | None, operator: Operator, arenas: Path | None) -> Space:
    """The space that the strategy searches: its own kind, or the coefficients that the study describes."""
    experts, options = max(len(spec.experts), 1), template.options
    entry = get_entry("cma_es" if spec.strategy.name == AUTO else spec.strategy.name)
    section = _with_preset(spec.space, entry, layout)
    section.check_kind(entry.space, f"strategy {entry.name}")
    if entry.space != "coefficients" and layout is None:
        raise InputError(f"strategy.name: {entry.name} searches merges of models; set base and experts")
    default_bounds, default_start = operator.bounds(experts, options), operator.default(experts, options)
    if layout is None or entry.space == "coefficients":
        return build_space(
            section,
            template,
            layout,
            default_bounds=default_bounds,
            default_start=default_start,
            change_sums=lambda: _change_sums(template, arenas),
        )
    if entry.space == "product":
        return adapter_space(template, layout)
    products = _inner_products(template, arenas)
    if entry.space == "mixed":
        return mixed_space(template, layout, layers=section.layers or 2, gram=products)
    low, high = section.bounds or arc_bounds(*default_bounds)
    start = section.start if isinstance(section.start, float) else default_start
    return segment_space(
        template, layout, segments=section.segments or 64, low=low, high=high, start=start, gram=products
    )


def _parameter_space(spec: StudySpec, template: Recipe, evaluator: RoutedEvaluator) -> ParameterSpace:
    """The parameters of an input-dependent merge, for strategies that search any box."""
    entry = get_entry("cma_es" if spec.strategy.name == AUTO else spec.strategy.name)
    method = evaluator.fixed["method"]
    if entry.space != "coefficients":
        raise InputError(
            f"strategy.name: expected one that searches any box, for the parameters of {method}, received "
            f"{entry.name}, which searches merges of its own; choose cma_es, for example"
        )
    given = [key for key in SpaceSpec.model_fields if getattr(spec.space, key) != getattr(SpaceSpec(), key)]
    if given:
        raise InputError(
            f"space.{given[0]}: expected no space for {method}, whose parameters are searched in the place of "
            "coefficients; leave it out"
        )
    parameters = evaluator.parameters
    return ParameterSpace(
        names=tuple(parameter.name for parameter in parameters),
        lower=np.array([parameter.lower for parameter in parameters]),
        upper=np.array([parameter.upper for parameter in parameters]),
        start=np.array([parameter.start for parameter in parameters]),
        template=template,
        fixed=tuple(sorted(evaluator.fixed.items())),
    )


def _with_preset(section: SpaceSpec, entry: Entry, layout: Layout | None) -> SpaceSpec:
    """The section with what the strategy presets and the study leaves open."""
    preset = {key: value for key, value in entry.preset.items() if getattr(section, key) is None}
    if layout is None or section.depth is not None:
        preset.pop("granularity", None)
    return section.model_copy(update=preset)


def _change_sums(template: Recipe, arenas: Path | None) -> npt.NDArray[np.float64]:
    """How much the experts change every tensor; reads the weights, unless another plan of this run has."""
    from merging.changes import change_sums
    from merging.family import open_family
    from merging.memo import Memo

    return change_sums(open_family(template, None if arenas is None else Memo(arenas / "shared")))


def _inner_products(
    template: Recipe, arenas: Path | None
) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]:
    """Boundaries -> inner products of base and rows in every segment, from arenas that are opened on first use."""

    @cache
    def index() -> Any:
        from merging.arena import open_arenas
        from merging.memo import Memo
        from merging.segment_gram import SegmentGram

        if arenas is None:
            raise MergesearchError("expected to read no weights, received a point that needs inner products of them")
        memo = Memo(arenas / "shared")
        return SegmentGram.of(open_arenas(template, arenas), memo=memo, key=["basis", template.basis_key])

    def products(boundaries: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = index().gram(boundaries)
        return found

    return products


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


def _check_references(plan: Plan) -> None:
    """Refuse objectives relative to experts, and reference scores of anchors, that the study does not have."""
    known = ["base", *(f"expert {expert.name}" for expert in plan.template.experts)] if plan.layout is not None else []
    odd = sorted(plan.evaluator.references() - set(known))
    if odd:
        raise InputError(
            f"evaluators: objectives are relative to {odd[0]!r}: expected one of {known}; write `experts: {{domain: "
            "expert}` where they have other names"
        )
    unknown = sorted(set(plan.spec.reference_scores) - {anchor.name for anchor in plan.anchors})
    if unknown:
        names = [anchor.name for anchor in plan.anchors]
        raise InputError(f"reference_scores.{unknown[0]}: expected one of the anchors {names}, received {unknown[0]!r}")


def _check_gradients(plan: Plan) -> None:
    """Refuse merges that are not smooth in their coefficients, before weights are read."""
    name, special = plan.entry.name, plan.spec.special
    if plan.spec.workers.gpus > 1:
        raise InputError(
            f"workers.gpus: expected at most 1 with strategy {name}, which follows gradients, received "
            f"{plan.spec.workers.gpus:g}; a model on several GPUs gives none"
        )
    if special.batch_norm in ("merge", "recalibrate"):
        raise InputError(
            f"special.batch_norm: expected base or refuse with strategy {name}, as no gradient reaches running "
            f"statistics, received {special.batch_norm}"
        )
    if plan.strategy.options.get("oracle") == "cosine" and special.scalars == "log":
        raise InputError("strategy.oracle: expected exact with special.scalars: log, received cosine; choose either")
    if plan.template.options.get("mode") == "live":
        raise InputError(
            f"operator.mode: expected frozen with strategy {name}, received live: signs that are elected anew make "
            "merges jump"
        )


def _check_capabilities(plan: Plan) -> None:
    entry = plan.entry
    lacking = sorted(entry.load().needs - plan.evaluator.provides)
    if lacking:
        raise InputError(
            f"strategy.name: {entry.name} needs {lacking} from the evaluators, which provide "
            f"{sorted(plan.evaluator.provides)}; choose another strategy or evaluator"
        )
    if plan.differentiable_space is not None:
        _check_gradients(plan)
    left = plan.search_trials
    if left is not None and left < 1:
        need = len(plan.anchors) + 1 + plan.recommended_trials
        counted = f"{len(plan.anchors)} anchors, 1 search trial, {plan.recommended_trials} recommendation"
        budget = plan.spec.budget
        if budget.trials is not None and budget.trials < need:
            raise InputError(f"budget.trials: expected at least {need} ({counted}), received {budget.trials}")
        each = plan.evaluator.cost("search")
        raise InputError(
            f"budget.evaluations: expected at least {need * each} ({counted}, {each} evaluations each), received "
            f"{budget.evaluations}"
        )
    # Refusals by dimension, objectives and space are the strategy's own: ask it, on what is known so far.
    count = len(plan.objectives)
    problem = plan.problem(Normaliser(np.zeros(count), np.ones(count)), left or 1000, plan.space.start)
    build_strategy(entry.name, check_options(entry.name, plan.strategy.options), problem, plan.spec.seed)
