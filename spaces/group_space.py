"""The spaces over groups of tensors: one coefficient for each group, or curves over depth.

Groups that the study names come first; the others are those of a granularity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mergesearch.merging import InputError
from mergesearch.spaces.base import Point
from mergesearch.spaces.coefficient_space import CoefficientSpace
from mergesearch.spaces.groups import Granularity, Group, group_tensors
from mergesearch.spaces.named_groups import REST, named_groups
from mergesearch.spaces.parts.curves import Curve, make_curves
from mergesearch.spaces.request import (
    SpaceRequest,
    check_start,
    coefficient_bounds,
    excluded_tensors,
)
from mergesearch.spaces.section import DepthSpec


def build_group_space(request: SpaceRequest) -> CoefficientSpace:
    """The space with one coefficient per group of tensors.

    Raises:
        InputError: If a value is not allowed, or does not fit the tensors.
    """
    bounds = coefficient_bounds(request)
    granularity = request.section.granularity or "block"
    assert granularity != "chunk"
    groups = _groups(request, granularity)
    title = f"named groups and {granularity}" if request.section.groups else granularity
    return _coefficient_space(request, title, groups, (), bounds)


def build_curve_space(request: SpaceRequest) -> CoefficientSpace:
    """The space of curves over depth; groups outside the blocks may have their own coefficients.

    Raises:
        InputError: If a value is not allowed, or does not fit the tensors.
    """
    bounds = coefficient_bounds(request)
    depth = request.section.depth
    assert depth is not None
    groups = _groups(request, "block_module" if depth.modules else "block")
    curves = make_curves(groups, depth.basis, depth.size, modules=depth.modules, ends=depth.ends)
    title = _curve_title(depth, shared=request.section.granularity == "global")
    return _coefficient_space(
        request, title, groups, curves, bounds, clip=bounds if depth.clip else None
    )


def _groups(request: SpaceRequest, granularity: Granularity) -> tuple[Group, ...]:
    """Groups that hold parameters; under curves ``granularity`` is that of the blocks."""
    section = request.section
    excluded = excluded_tensors(request)
    if section.chunks is not None:
        raise InputError("space.chunks: only allowed with space.granularity: chunk")
    if section.depth is not None and section.granularity not in (None, "global", "task"):
        raise InputError(
            f"space.granularity: {section.granularity!r} cannot be combined with space.depth; "
            "allowed with curves are 'global' and 'task' (separate attention and MLP curves: "
            "depth.modules: true)"
        )
    layout = request.model_layout
    named = named_groups(layout, section.groups or {}, excluded)
    left_out = excluded.union(*(group.tensors for group in named))
    others: tuple[Group, ...] = ()
    if not named or len(left_out) < len(layout.names):
        others = group_tensors(layout, granularity, left_out)
    if named and [group.name for group in others] == ["all"]:
        others = (replace(others[0], name=REST),)
    return tuple(group for group in (*named, *others) if group.parameters)


def _curve_title(depth: DepthSpec, *, shared: bool) -> str:
    parts = " x {attention, mlp}" if depth.modules else ""
    return f"{'shared ' if shared else ''}{depth.basis} curve{parts}"


def _coefficient_space(
    request: SpaceRequest,
    title: str,
    groups: tuple[Group, ...],
    curves: tuple[Curve, ...],
    bounds: tuple[float, float],
    *,
    clip: tuple[float, float] | None = None,
) -> CoefficientSpace:
    """The space of these groups and curves, with its box and its start."""
    shared = request.section.granularity == "global"
    copies = 1 if shared else request.directions
    own = len(groups) - sum(curve.groups.size for curve in curves)
    lower, upper = _box(curves, own, copies, bounds)
    space = CoefficientSpace(
        template=request.template,
        layout=request.model_layout,
        title=title,
        groups=groups,
        lower=lower,
        upper=upper,
        start=_start(request, curves, own, copies, lower.size),
        curves=curves,
        shared=shared,
        clip=clip,
    )
    if request.section.groups:
        _check_names(space)
    check_start(request.section, space)
    return space


def _check_names(space: CoefficientSpace) -> None:
    """Refuse named groups that are called like another coordinate.

    Raises:
        InputError: In one line.
    """
    twice = [name for name, count in Counter(space.names).items() if count > 1]
    if twice:
        raise InputError(
            "space.groups: expected names that no other coordinate has, received two coordinates "
            f"{twice[0]!r}; choose other names"
        )


def _box(
    curves: Sequence[Curve], own: int, copies: int, bounds: tuple[float, float]
) -> tuple[Point, Point]:
    """Bounds of the coordinates, each ``(dim,)``.

    Args:
        curves: The curves, whose terms come first in every direction.
        own: Number of groups with a coefficient of their own.
        copies: How many directions have coordinates of their own.
        bounds: Bounds of a coefficient.
    """
    boxes = [curve.basis.box(*bounds) for curve in curves]
    lower = np.concatenate([*(box[0] for box in boxes), np.full(own, bounds[0])])
    upper = np.concatenate([*(box[1] for box in boxes), np.full(own, bounds[1])])
    return np.tile(lower, copies), np.tile(upper, copies)


def _start(
    request: SpaceRequest, curves: Sequence[Curve], own: int, copies: int, dim: int
) -> Point:
    """Where the search begins ``(dim,)``: one coefficient per direction, or any point."""
    start = request.section.start
    values = float(request.default_start) if start is None else start
    given = (
        np.full(copies, values, np.float64)
        if isinstance(values, float)
        else np.array(values, np.float64)
    )
    if given.size == dim and isinstance(values, list):
        return given
    if given.size != copies:
        raise InputError(
            f"space.start: expected a number, or a list of {copies} (one per expert) or {dim} (one "
            f"per coordinate), received a list of {given.size}"
        )
    constants = [curve.basis.constant(given) for curve in curves]
    return np.concatenate([*constants, np.repeat(given[:, None], own, axis=1)], axis=1).ravel()
