"""spaces."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.routing.routed import RoutedEvaluator
from mergesearch.merging import InputError, Layout, MergesearchError, Recipe
from mergesearch.merging.operators import Operator
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.strategies.table import AUTO, StrategyInfo, get_strategy_info
from mergesearch.spaces import ParameterSpace, Space, adapter_space, mixed_space, segment_space
from mergesearch.spaces.segment_space import arc_bounds
from mergesearch.spaces.spec import SpaceSpec, build_space


def _space(
    spec: StudySpec,
    template: Recipe,
    layout: Layout | None,
    operator: Operator,
    arenas: Path | None,
) -> Space:
    """The space that the strategy searches: its own kind, or the coefficients that the study
    describes.
    """
    experts = max(len(spec.experts), 1)
    options = template.options
    entry = get_strategy_info("cma_es" if spec.strategy.name == AUTO else spec.strategy.name)
    section = _with_preset(spec.space, entry, layout)
    section.check_kind(entry.space, f"strategy {entry.name}")
    if entry.space != "coefficients" and layout is None:
        raise InputError(
            f"strategy.name: {entry.name} searches merges of models; set base and experts"
        )
    default_bounds = operator.bounds(experts, options)
    default_start = operator.default(experts, options)
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
        template,
        layout,
        segments=section.segments or 64,
        low=low,
        high=high,
        start=start,
        gram=products,
    )


def _parameter_space(
    spec: StudySpec, template: Recipe, evaluator: RoutedEvaluator
) -> ParameterSpace:
    """The parameters of an input-dependent merge, for strategies that search any box."""
    entry = get_strategy_info("cma_es" if spec.strategy.name == AUTO else spec.strategy.name)
    method = evaluator.fixed["method"]
    if entry.space != "coefficients":
        raise InputError(
            f"strategy.name: expected one that searches any box, for the parameters of {method}, "
            "received "
            f"{entry.name}, which searches merges of its own; choose cma_es, for example"
        )
    given = [
        key
        for key in SpaceSpec.model_fields
        if getattr(spec.space, key) != getattr(SpaceSpec(), key)
    ]
    if given:
        raise InputError(
            f"space.{given[0]}: expected no space for {method}, whose parameters are searched in "
            "the place of "
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


def _with_preset(section: SpaceSpec, entry: StrategyInfo, layout: Layout | None) -> SpaceSpec:
    """The section with what the strategy presets and the study leaves open."""
    preset = {key: value for key, value in entry.preset.items() if getattr(section, key) is None}
    if layout is None or section.depth is not None:
        preset.pop("granularity", None)
    return section.model_copy(update=preset)


def _change_sums(template: Recipe, arenas: Path | None) -> npt.NDArray[np.float64]:
    """How much the experts change every tensor; reads the weights, unless another plan of this run
    has.
    """
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.resident.changes import change_sums
    from mergesearch.merging.tensors.memo import Memo

    return change_sums(open_family(template, None if arenas is None else Memo(arenas / "shared")))


def _inner_products(
    template: Recipe, arenas: Path | None
) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]:
    """Boundaries -> inner products of base and rows in every segment, from arenas that are opened
    on first use.
    """

    @cache
    def index() -> Any:
        from mergesearch.merging.resident.arena import open_arenas
        from mergesearch.merging.resident.segment_gram import SegmentGram
        from mergesearch.merging.tensors.memo import Memo

        if arenas is None:
            raise MergesearchError(
                "expected to read no weights, received a point that needs inner products of them"
            )
        memo = Memo(arenas / "shared")
        return SegmentGram.of(
            open_arenas(template, arenas), memo=memo, key=["basis", template.basis_key]
        )

    def products(boundaries: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = index().gram(boundaries)
        return found

    return products
