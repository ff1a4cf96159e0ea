"""A study whose search begins at an imported merge."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging import InputError, Layout, Recipe
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.coefficients import field_of, rows_by_tensor
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.foreign.shown import name_shown
from mergesearch.merging.foreign.sizes import MOST
from mergesearch.merging.mergekit_format.importing import Imported
from mergesearch.merging.mergekit_format.patterns import block_patterns, filter_patterns
from mergesearch.merging.mergekit_format.places import all_settings
from mergesearch.merging.mergekit_format.settings import gradients_of
from mergesearch.merging.operators import get_operator
from mergesearch.merging.recipe import Source
from mergesearch.merging.recipe_file import recipe_text
from mergesearch.merging.tensors.field import Field
from mergesearch.spaces.coefficient_space import CoefficientSpace
from mergesearch.spaces.groups import groups_by_name
from mergesearch.spaces.spec import SpaceSpec, build_space

#: How far the start of a space may be from the merge that it stands for.
CLOSE = 1e-9
_HEAD = """\
# From {source}: the search begins at its merge.
"""
_LACKING = """\
# `evaluators` says what a good merge is; `mergesearch help study.evaluators` lists the kinds, and
# `mergesearch check` says what is missing.
"""


@dataclass(frozen=True)
class _Merge:
    """An imported merge over the tensors of its base.

    Attributes:
        template: It, with its coefficients.
        layout: The tensors.
        rows: Coefficient of every expert at every tensor ``(tensors, experts)``.
        bounds: Those of the operator, wide enough for all coefficients.
        start: The operator's default coefficient.
    """

    template: Recipe
    layout: Layout
    rows: npt.NDArray[np.float64]
    bounds: tuple[float, float]
    start: float


def study_text(
    imported: Imported, source: Path, evaluators: Sequence[Mapping[str, Any]] = ()
) -> str:
    """A study file whose space holds the imported merge as its start.

    Filters become named groups and gradients curves over depth where these say the merge; else the
    coarsest granularity that does.

    Args:
        imported: The merge.
        source: Where it comes from.
        evaluators: What a good merge is; without any they are left to fill in.

    Raises:
        InputError: If the merge cannot be the start of a space.
        CheckpointError: If its base cannot be opened.
    """
    recipe = imported.recipe
    data = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", source.stem).strip("-._") or "merge",
        "base": recipe["base"],
        "experts": recipe["experts"],
        "operator": {"name": recipe["operator"], **recipe.get("hyperparameters", {})},
        **({"special": recipe["special"]} if "special" in recipe else {}),
        "space": _space(_merge(recipe), imported),
        "evaluators": [dict(section) for section in evaluators],
        "budget": {"trials": 200},
    }
    head = _HEAD.format(source=name_shown(source.name)) + ("" if evaluators else _LACKING)
    return head + recipe_text(data)


def _merge(recipe: dict[str, Any]) -> _Merge:
    operator = get_operator(recipe["operator"])
    experts = [Source(name, path) for name, path in recipe["experts"].items()]
    options = operator.complete(recipe.get("hyperparameters", {}))
    layout = layout_of(open_checkpoint(recipe["base"]))
    names = [expert.name for expert in experts]
    groups = groups_by_name(layout)
    field = field_of(recipe["coefficients"], layout, names, len(names), groups)
    rows = rows_by_tensor(field, layout)
    assert rows is not None  # each tensor has one coefficient
    table = np.array([rows[name] for name in layout.names])
    largest = float(np.abs(table).max(initial=0))
    if largest > MOST:
        raise InputError(
            f"import: expected coefficients of at most {MOST:,}, where a space can begin, received "
            f"{largest:g}"
        )
    low, high = operator.bounds(len(experts), options)
    template = Recipe(
        Source("base", recipe["base"]), tuple(experts), recipe["operator"], field, (), layout.digest
    )
    bounds = (min(low, float(table.min())), max(high, float(table.max())))
    return _Merge(template, layout, table, bounds, operator.default(len(experts), options))


def _space(merge: _Merge, imported: Imported) -> dict[str, Any]:
    """The first space that holds the merge."""
    for section in _candidates(merge, imported):
        section = {**section, "bounds": list(merge.bounds)}
        point = _point(section, merge)
        if point is not None:
            return {**section, "start": _short(point, len(merge.template.experts))}
    raise InputError("import: expected a merge with one coefficient a tensor, received another")


def _candidates(merge: _Merge, imported: Imported) -> Iterator[dict[str, Any]]:
    """Sections of a space, those with the fewest coefficients first."""
    groups = filter_patterns(imported.file, merge.layout.names)
    named = {"groups": groups} if groups else {}
    yield {"granularity": "task", **named}
    for size in _lengths(imported):
        yield {"granularity": "task", **named, "depth": {"basis": "linear", "size": size}}
    yield {"granularity": "module"}
    yield {"granularity": "block", **named}
    by_block = block_patterns(groups, merge.layout.names)
    if by_block:
        yield {"granularity": "block", "groups": by_block}
    yield {"granularity": "block_module"}
    yield {"granularity": "tensor"}


def _lengths(imported: Imported) -> list[int]:
    """Numbers of values of the gradients."""
    settings = [setting for _, setting in all_settings(imported.file)]
    return sorted({len(each) for setting in settings for each in gradients_of(setting)})


def _point(section: dict[str, Any], merge: _Merge) -> npt.NDArray[np.float64] | None:
    """The point of a space that stands for the merge ``(dim,)``, or None."""
    try:
        space = build_space(
            SpaceSpec.model_validate({**section, "start": merge.bounds[0]}),
            merge.template,
            merge.layout,
            default_bounds=merge.bounds,
            default_start=merge.start,
        )
    except InputError:
        return None  # a model without blocks, fewer of them than values, groups that overlap
    assert isinstance(space, CoefficientSpace)
    point = _by_least_squares(space, merge) if space.curves else _by_groups(space, merge)
    inside = bool((point >= space.lower - CLOSE).all() and (point <= space.upper + CLOSE).all())
    if not inside or np.abs(_rows(space.decode(point).field, merge) - merge.rows).max() > CLOSE:
        return None
    return np.clip(point, space.lower, space.upper)


def _by_groups(space: CoefficientSpace, merge: _Merge) -> npt.NDArray[np.float64]:
    """Coefficients of the first tensor of every group, expert after expert ``(dim,)``."""
    places = [merge.layout.names.index(group.tensors[0]) for group in space.groups]
    return np.asarray(merge.rows[places].T.ravel(), np.float64)


def _by_least_squares(space: CoefficientSpace, merge: _Merge) -> npt.NDArray[np.float64]:
    """The point whose merge is closest; coefficients are linear in the point."""
    columns = [_rows(space.decode(unit).field, merge).ravel() for unit in np.eye(len(space.names))]
    found, *_ = np.linalg.lstsq(np.array(columns).T, merge.rows.ravel(), rcond=None)
    return np.asarray(np.round(found, 12), np.float64)


def _rows(field: Field, merge: _Merge) -> npt.NDArray[np.float64]:
    """A field at the beginning of every tensor ``(tensors, experts)``."""
    return field.at([spec.start for spec in merge.layout.tensors]).T


def _short(point: npt.NDArray[np.float64], experts: int) -> Any:
    """A start as one would write it: one number for all, one for each expert, or the point."""
    by_expert = point.reshape(experts, -1)
    if (by_expert == by_expert[:, :1]).all():
        first = by_expert[:, 0].tolist()
        return first[0] if len(set(first)) == 1 else first
    return point.tolist()
