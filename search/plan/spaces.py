"""The space of a study: coefficients, a space of the strategy's own, or parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.routing.routed import RoutedEvaluator
from mergesearch.merging import InputError, Layout, MergesearchError, Recipe
from mergesearch.merging.family.placing.widths import ChosenWidths
from mergesearch.merging.kernels.spans import RowsSetting
from mergesearch.merging.operators import Operator
from mergesearch.merging.tensors.memo import Memo
from mergesearch.search.plan.survey import Survey
from mergesearch.search.spec.auto_operator import AUTO_OPERATOR
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.strategies.table import AUTO, StrategyInfo, get_strategy_info
from mergesearch.spaces import ParameterSpace, Space
from mergesearch.spaces.blend_space import blend_space
from mergesearch.spaces.section import BitsSpec
from mergesearch.spaces.spec import SpaceSpec, build_space, check_keys
from mergesearch.spaces.widths_space import WidthsSpace, build_widths_space


def study_space(
    spec: StudySpec,
    template: Recipe,
    layout: Layout | None,
    operator: Operator,
    arenas: Path | None,
    survey: Survey | None = None,
) -> Space:
    """The space that the strategy searches: its own kind, or the coefficients of the study.

    Args:
        spec: The resolved study file.
        template: The study's recipe with coefficients 0.
        layout: The flat index, or None for analytic problems.
        operator: The study's operator.
        arenas: Where prepared weights are, for spaces that read them.
        survey: The operators of a study that chooses among them.

    Raises:
        InputError: If the study describes a space that the strategy does not search.
    """
    if spec.space.widths is not None:
        return _widths_space(spec, template, layout, operator, arenas)
    experts = max(len(spec.experts), 1)
    options = template.options
    entry = get_strategy_info("cma_es" if spec.strategy.name == AUTO else spec.strategy.name)
    section = _with_preset(spec.space, entry, layout)
    check_keys(section, entry.space, f"strategy {entry.name}")
    if entry.space != "coefficients" and layout is None:
        raise InputError(
            f"strategy.name: {entry.name} searches merges of models; set base and experts"
        )
    build = partial(
        build_space,
        template=template,
        layout=layout,
        searched=entry.space,
        change_sums=lambda: _change_sums(template, arenas),
        gram=_inner_products(template, arenas, spec.rows),
        importance=lambda bits: _importance(template, bits, arenas),
    )
    if survey is not None:
        return _blend_space(build, section, survey, entry)
    return build(
        section,
        default_bounds=operator.bounds(experts, options),
        default_start=operator.default(experts, options),
    )


def _widths_space(
    spec: StudySpec,
    template: Recipe,
    layout: Layout | None,
    operator: Operator,
    arenas: Path | None,
) -> WidthsSpace:
    """The space of the coefficients at every choice of widths, and the widths.

    Raises:
        InputError: If no layer gets wider, or the study describes a space that depends on shapes.
    """
    section = spec.space.widths
    assert section is not None
    _check_widths(spec, layout)
    assert layout is not None
    memo = None if arenas is None else Memo(arenas / "shared")
    chosen = ChosenWidths(template, layout, memo)
    plain = spec.model_copy(update={"space": spec.space.model_copy(update={"widths": None})})

    def space_at(shares: tuple[float, ...]) -> Space:
        recipe, own = chosen.at(dict(zip(chosen.units, shares, strict=True)))
        return study_space(plain, recipe, own, operator, arenas)

    return build_widths_space(section, chosen, space_at)


def _check_widths(spec: StudySpec, layout: Layout | None) -> None:
    special = spec.special
    aligned = bool(special.align) and all(s.method == "pleas" for s in special.align.values())
    if layout is None or not aligned:
        raise InputError(
            "space.widths: expected experts under align: pleas, whose layers get wider, received "
            "none; set experts.NAME.align, or leave it out"
        )
    changed = [key for key in ("vocabulary", "absent", "tied") if key in dict(special.choices)]
    if changed:
        raise InputError(
            f"space.widths: expected special.{changed[0]} at its default, as only widths may "
            "change shapes; leave one of them out"
        )
    if spec.operator.name == AUTO_OPERATOR or spec.space.bits or spec.space.granularity == "chunk":
        raise InputError(
            "space.widths: expected a named operator, no space.bits and another granularity than "
            "chunk, whose prepared weights have one shape; change these"
        )
    entry = get_strategy_info("cma_es" if spec.strategy.name == AUTO else spec.strategy.name)
    if entry.space != "coefficients":
        raise InputError(
            f"strategy.name: expected one that searches any box with space.widths, received "
            f"{entry.name}; choose cma_es, for example"
        )


def _blend_space(
    build: Callable[..., Space], section: SpaceSpec, survey: Survey, entry: StrategyInfo
) -> Space:
    """The space around the best operator of a study that chooses one.

    Raises:
        InputError: If the strategy searches another space, or the study gives a start.
    """
    if entry.space != "coefficients":
        raise InputError(
            f"strategy.name: expected one that searches coefficients with operator auto, received "
            f"{entry.name}; choose cma_es, for example"
        )
    if section.start is not None:
        raise InputError(
            "space.start: expected none with operator auto, whose search begins at the best "
            "operator; leave it out"
        )
    others = section.model_copy(update={"bounds": None})
    return blend_space(
        lambda bounds, start: build(section, default_bounds=bounds, default_start=start),
        lambda bounds, start: build(others, default_bounds=bounds, default_start=start),
        survey.leader_rows(),
        survey.choice.coefficients[0],
    )


def parameter_space(
    spec: StudySpec, template: Recipe, evaluator: RoutedEvaluator
) -> ParameterSpace:
    """The parameters of an input-dependent merge, for strategies that search any box.

    Raises:
        InputError: If the strategy has a space of its own, or the study describes one.
    """
    entry = get_strategy_info("cma_es" if spec.strategy.name == AUTO else spec.strategy.name)
    method = evaluator.fixed["method"]
    if entry.space != "coefficients":
        raise InputError(
            f"strategy.name: expected one that searches any box, for the parameters of {method}, "
            f"received {entry.name}, which searches merges of its own; choose cma_es, for example"
        )
    given = [
        key
        for key in SpaceSpec.model_fields
        if getattr(spec.space, key) != getattr(SpaceSpec(), key)
    ]
    if given:
        raise InputError(
            f"space.{given[0]}: expected no space for {method}, whose parameters are searched "
            "instead of coefficients; leave it out"
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
    """The section with the strategy's presets for keys that the study does not set."""
    preset = {key: value for key, value in entry.preset.items() if getattr(section, key) is None}
    if layout is None or section.depth is not None:
        preset.pop("granularity", None)
    return section.model_copy(update=preset)


def _change_sums(template: Recipe, arenas: Path | None) -> npt.NDArray[np.float64]:
    """How much the experts change every tensor; reads the weights once for all plans of a run."""
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.resident.changes import change_sums
    from mergesearch.merging.tensors.memo import Memo

    return change_sums(open_family(template, None if arenas is None else Memo(arenas / "shared")))


def _importance(template: Recipe, bits: BitsSpec, arenas: Path | None) -> npt.NDArray[np.float64]:
    """How much every layer matters, in the mean over the experts; read once for all plans."""
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.models.layer_bits import bit_layers
    from mergesearch.merging.models.layer_importance import mean_importance
    from mergesearch.merging.tensors.memo import Memo

    family = open_family(template, None if arenas is None else Memo(arenas / "shared"))
    layers = bit_layers(family.layout)
    return mean_importance(family.base, family.experts, layers, bits.calibration)


def _inner_products(
    template: Recipe, arenas: Path | None, rows: RowsSetting
) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]:
    """Boundaries -> inner products of base and rows in every segment.

    The arenas are opened at the first call.
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
        key = ["basis", template.basis_key, *([] if rows == "auto" else [rows])]
        return SegmentGram.of(open_arenas(template, arenas, rows=rows), memo=memo, key=key)

    def products(boundaries: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        gram: npt.NDArray[np.float64] = index().gram(boundaries)
        return gram

    return products
