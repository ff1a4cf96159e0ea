"""A checked study, ready to run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Batch, Evaluator, Objective
from mergesearch.merging import Field, Layout, Recipe
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.family.heads import Heads
from mergesearch.search.front import Normaliser, signs
from mergesearch.search.plan.anchors import Anchor, reference_recipe
from mergesearch.search.plan.survey import Survey
from mergesearch.search.spec.sections import StrategySection, StudySpec
from mergesearch.search.strategies.base import Point, Problem, TrialResult
from mergesearch.search.strategies.table import StrategyInfo, get_strategy_info
from mergesearch.spaces import DifferentiableSpace, Space
from mergesearch.spaces.mixture_space import MixtureSpace
from mergesearch.spaces.widths_space import WidthsSpace

#: What workers may keep where a strategy holds lower blocks and the study says nothing.
HIDDEN_STATES_GB = 1.0


@dataclass(frozen=True)
class Plan:
    """A checked study, ready to run.

    Attributes:
        spec: The resolved study file.
        template: The study's recipe with coefficients 0; every trial has another field.
        family: Base and experts, opened once, or None for analytic problems without weights.
        space: The space that is searched.
        evaluator: Not opened; only its declarations are used in the driver.
        anchors: Known merges to measure first.
        weights: Relative importance of the objectives, summing to 1, ``(objectives,)``.
        strategy: The strategy; where the study says ``auto``, the one that was chosen.
        begin: Point where the search begins, if the study takes it from another run.
        notes: What a start from other runs shares with this study, one line each.
        survey: The operators of a study that chooses among them (``operator: auto``).
    """

    spec: StudySpec
    template: Recipe
    family: ModelFamily | None
    space: Space
    evaluator: Evaluator
    anchors: tuple[Anchor, ...]
    weights: npt.NDArray[np.float64]
    strategy: StrategySection
    begin: Point | None = None
    survey: Survey | None = None
    notes: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout | None:
        """The flat index, or None for analytic problems without weights."""
        return None if self.family is None else self.family.layout

    def layout_of(self, recipe: Recipe) -> Layout | None:
        """The flat index of a merge of the study, whose layers may be wider than most."""
        known = None
        if isinstance(self.space, WidthsSpace):
            known = self.space.layout_of(recipe)
        return known or self.layout

    @property
    def heads(self) -> Heads | None:
        """What base and experts keep for themselves; None where they share all tensors."""
        return None if self.family is None else self.family.heads

    @property
    def undecided(self) -> bool:
        """Whether operators must be measured before it is known what is searched."""
        return self.survey is not None and not self.survey.decided

    @property
    def recorded_template(self) -> Recipe:
        """The recipe that the trial log refers to; the same before and after the decision."""
        return self.template if self.survey is None else self.survey.template

    def point_of(self, recipe: Recipe) -> Point | None:
        """The point of a known merge, or None where the space does not hold it in its bounds."""
        field: Field | None = None
        if isinstance(self.space, MixtureSpace):
            point = self.space.point_of(recipe)
            return None if point is None else self._within(point)
        if recipe.basis_key == self.template.basis_key:
            field = recipe.field
        elif self.survey is not None:
            field = self.survey.in_blend(recipe)
        point = None if field is None else self.space.encode(field)
        return None if point is None else self._within(point)

    def _within(self, point: Point) -> Point | None:
        """The point, or None where it lies outside the bounds."""
        outside = (point < self.space.lower) | (point > self.space.upper)
        return None if bool(np.any(outside)) else point

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives, in the study's order."""
        return self.evaluator.objectives

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about base, experts and the start, one line each."""
        if self.layout is None:
            return self.notes
        sources = [self.template.base, *self.template.experts]
        return (*self.evaluator.warnings([source.path for source in sources]), *self.notes)

    @property
    def entry(self) -> StrategyInfo:
        """The strategy's entry in the table of strategies."""
        return get_strategy_info(self.strategy.name)

    @property
    def needs(self) -> frozenset[str]:
        """What the strategy needs of the evaluators."""
        return self.entry.needs_with(self.strategy.options)

    @property
    def differentiable_space(self) -> DifferentiableSpace | None:
        """The space, for workers of a strategy that follows gradients; None for others."""
        if not {"gradient", "proxy"} & self.needs:
            return None
        assert isinstance(self.space, DifferentiableSpace)
        return self.space

    @property
    def hidden_states(self) -> int:
        """Bytes that each worker may keep of what lower blocks gave."""
        size = self.spec.workers.hidden_states_gb
        if size is None:
            size = HIDDEN_STATES_GB if self.entry.holds_blocks else 0
        return int(size * 1e9)

    @property
    def recommended_trials(self) -> int:
        """Trials kept back for the strategy's own recommendation."""
        return int(self.entry.load().recommends)

    @property
    def search_trials(self) -> int | None:
        """Trials on all items for the strategy's own suggestions; None where only time limits."""
        left = trials_of(self.spec, self.evaluator)
        return None if left is None else left - len(self.anchors) - self.recommended_trials

    def reference(self, name: str) -> Recipe:
        """The recipe of a model that objectives are relative to: ``base`` or ``expert NAME``."""
        assert self.layout is not None
        return reference_recipe(self.template, self.layout, name)

    def problem(
        self,
        normaliser: Normaliser,
        budget: int,
        start: Point,
        anchors: tuple[TrialResult, ...] = (),
    ) -> Problem:
        """The problem that the strategy is given."""
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
            proxies=self.evaluator.proxies,
            batch_items=self._batch_items,
        )

    def _batch_items(self, batch: Batch) -> int:
        """Items of a batch of everything that has gradients."""
        evaluator = self.evaluator
        return evaluator.batch_cost(batch, (*evaluator.differentiable, *evaluator.proxies))


def unanchored_trials(spec: StudySpec, evaluator: Evaluator, anchors: int) -> int | None:
    """Trials on all items that the budget pays for beside anchors; None where it is a time."""
    trials = trials_of(spec, evaluator)
    return None if trials is None else max(trials - anchors, 0)


def trials_of(spec: StudySpec, evaluator: Evaluator) -> int | None:
    """Trials on all items that the budget pays for; None where it is a time."""
    limits = [] if spec.budget.trials is None else [spec.budget.trials]
    if spec.budget.evaluations is not None:
        limits.append(spec.budget.evaluations // evaluator.cost("search"))
    return min(limits, default=None)
