"""The ``space:`` section of a study file, and the space that it describes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from pydantic import Field as Key

from mergesearch.merging import InputError, Layout, Recipe
from mergesearch.spaces.box_space import BoxSpace
from mergesearch.spaces.chunks import chunk_counts, chunk_groups, importance, tensors_of
from mergesearch.spaces.coefficient_space import CoefficientSpace, Point, Space
from mergesearch.spaces.depth_basis import Curve, make_curves
from mergesearch.spaces.groups import Granularity, group_tensors

# Strict, so that `true` and "0.3" are refused; whole numbers are accepted.
_Number = Annotated[float, Key(strict=True, allow_inf_nan=False)]


class DepthSpec(BaseModel):
    """The ``space.depth`` section: coefficients along curves over the blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    basis: Literal["linear", "dct", "bspline"] = Key(
        description="linear: values at the first and the last block; dct: cosines; bspline: "
        "control points."
    )
    size: int | None = Key(
        default=None,
        strict=True,
        description="Numbers per curve; by default 2 for linear, else 4 (or all blocks).",
    )
    modules: bool = Key(
        default=False, strict=True, description="Separate curves for attention and MLP."
    )
    ends: Literal["own", "curve"] = Key(
        default="own",
        description="Embeddings, final norm and head: coefficients of their own, or the end values "
        "of the curve.",
    )
    clip: bool = Key(
        default=False,
        strict=True,
        description="Clip the coefficients of the curve into the bounds; only cosines can leave "
        "them.",
    )


class ChunkSpec(BaseModel):
    """The ``space.chunks`` section: how many chunks tensors are cut into, by how much the experts
    change them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    total: float = Key(default=1.1, gt=0, strict=True, description="Chunks in all, per tensor.")
    concentration: float = Key(
        default=1.0,
        ge=0,
        strict=True,
        description="0: as many everywhere; above 1: more where much changes.",
    )
    most: int | None = Key(
        default=None, ge=1, strict=True, description="Chunks of one tensor at most."
    )
    remainder: bool = Key(
        default=False,
        strict=True,
        description="Hand out what rounding down leaves over, largest fractions first.",
    )


class SpaceSpec(BaseModel):
    """The ``space`` section: which merges the search may propose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    granularity: (
        Literal["global", "task", "module", "block", "block_module", "tensor", "chunk"] | None
    ) = Key(
        default=None,
        description="How finely coefficients vary: global (one, shared by all experts), task (one "
        "per expert), module, "
        "block, block_module (block x {attention, mlp}), tensor, chunk (parts of tensors, more "
        "where experts change "
        "them most). By default block, or task with a depth curve.",
    )
    chunks: ChunkSpec | None = Key(
        default=None, description="How many chunks, for granularity chunk only."
    )
    depth: DepthSpec | None = Key(
        default=None,
        description="Curves over depth, shared by all experts with granularity global, else per "
        "expert (task).",
    )
    bounds: tuple[_Number, _Number] | None = Key(
        default=None, description="[low, high] of every coefficient; by default the operator's."
    )
    start: _Number | list[_Number] | None = Key(
        default=None,
        description="Where the search begins: one coefficient, a list with one per expert, or a "
        "list with one per "
        "coordinate; by default the operator's.",
    )
    exclude: list[str] = Key(
        default_factory=list,
        description="Regular expressions; tensors whose name contains a match stay at the base, "
        "with coefficient 0.",
    )
    dim: int | None = Key(
        default=None,
        strict=True,
        description="Number of coordinates, for analytic problems without weights only.",
    )
    segments: int | None = Key(
        default=None,
        strict=True,
        ge=2,
        description="Most segments of a merge, for strategies that move split points.",
    )
    layers: int | None = Key(
        default=None,
        strict=True,
        ge=1,
        description="Blocks in a layer group, for strategies that choose operators.",
    )

    def check_kind(self, kind: str, who: str) -> None:
        """Refuse keys that mean nothing in a space of this kind.

        Args:
            kind: ``coefficients``, ``segments``, ``mixed`` or ``product``.
            who: Who searches it, for the message.

        Raises:
            InputError: If such a key is given.
        """
        allowed = _KEYS[kind]
        odd = sorted(
            key for key in self.model_fields_set - allowed if getattr(self, key) not in (None, [])
        )
        if odd:
            known = ", ".join(sorted(allowed)) or "none"
            raise InputError(f"space.{odd[0]}: means nothing to {who}; keys of its space: {known}")


#: Keys of the section that mean something, by the kind of space that a strategy searches.
_KEYS: dict[str, frozenset[str]] = {
    "coefficients": frozenset(
        {"granularity", "chunks", "depth", "bounds", "start", "exclude", "dim"}
    ),
    "segments": frozenset({"segments", "bounds", "start"}),
    "mixed": frozenset({"layers"}),
    "product": frozenset(),
}


def build_space(
    spec: SpaceSpec,
    template: Recipe,
    layout: Layout | None,
    *,
    default_bounds: tuple[float, float],
    default_start: float,
    change_sums: Callable[[], npt.NDArray[np.float64]] | None = None,
) -> Space:
    """Build the space that a study file describes.

    Args:
        spec: The ``space`` section.
        template: The merge whose field the points replace; its field tells the number of
            directions.
        layout: Where the merged tensors lie; None for an analytic problem without weights.
        default_bounds: The operator's bounds of a coefficient.
        default_start: The operator's default coefficient.
        change_sums: Σ |task vector| of every expert and tensor of the layout ``(K, tensors)``; only
            called for chunks, as it reads weights.

    Raises:
        InputError: If a value of the section is not allowed, or does not fit the tensors.
    """
    low, high = _bounds(spec, default_bounds)
    if layout is None:
        return _box(spec, template, low, high, default_start)
    if spec.dim is not None:
        raise InputError(
            f"space.dim: {spec.dim}: only allowed for analytic problems; models have "
            "space.granularity"
        )
    excluded = _excluded(spec.exclude, layout)
    if spec.granularity == "chunk":
        assert change_sums is not None
        return _chunk_space(
            spec, template, layout, excluded, (low, high), default_start, change_sums()
        )
    if spec.chunks is not None:
        raise InputError("space.chunks: only allowed with space.granularity: chunk")
    granularity = _granularity(spec)
    groups = tuple(
        group for group in group_tensors(layout, granularity, excluded) if group.parameters
    )
    curves: tuple[Curve, ...] = ()
    if spec.depth is not None:
        depth = spec.depth
        curves = make_curves(
            groups, depth.basis, depth.size, modules=depth.modules, ends=depth.ends
        )
    shared = spec.granularity == "global"
    own = len(groups) - sum(curve.groups.size for curve in curves)
    copies = 1 if shared else template.field.directions
    lower, upper = _box_of_coordinates(curves, own, copies, low, high)
    start = _start(spec, curves, own, copies, lower.size, default_start)
    space = CoefficientSpace(
        template=template,
        layout=layout,
        title=_title(spec, granularity),
        groups=groups,
        lower=lower,
        upper=upper,
        start=start,
        curves=curves,
        shared=shared,
        clip=(low, high) if spec.depth is not None and spec.depth.clip else None,
    )
    _check_start(spec, space.names, start, lower, upper)
    return space


def _chunk_space(
    spec: SpaceSpec,
    template: Recipe,
    layout: Layout,
    excluded: frozenset[str],
    bounds: tuple[float, float],
    default_start: float,
    sums: npt.NDArray[np.float64],
) -> CoefficientSpace:
    if spec.depth is not None:
        raise InputError("space.granularity: 'chunk' cannot be combined with space.depth")
    section = spec.chunks or ChunkSpec()
    directions = template.field.directions
    values = default_start if spec.start is None else spec.start
    begin = (
        np.broadcast_to(np.asarray(values, np.float64), directions)
        if np.size(values) in (1, directions)
        else None
    )
    if begin is None:
        raise InputError(
            f"space.start: expected a number or a list of {directions} (one per expert), for chunks"
        )
    whole = tensors_of(layout, excluded)
    place = {name: index for index, name in enumerate(layout.names)}
    of_tensors = sums[:, [place[group.tensors[0]] for group in whole]]
    # Directions of fused operators are no experts: each of their experts weighs the same.
    share = importance(of_tensors, begin if len(begin) == len(sums) else np.ones(len(sums)))
    counts = chunk_counts(
        share,
        [group.parameters for group in whole],
        section.total,
        section.concentration,
        most=section.most,
        remainder=section.remainder,
    )
    chunks, held = chunk_groups(layout, counts, excluded)
    if not chunks:
        raise InputError(
            f"space.chunks.total: expected at least one chunk, received {section.total:g}, which "
            "gives 0"
        )
    size = directions * len(chunks)
    lower = np.full(size, bounds[0])
    upper = np.full(size, bounds[1])
    space = CoefficientSpace(
        template=template,
        layout=layout,
        title="chunk",
        groups=(*chunks, *held),
        lower=lower,
        upper=upper,
        start=np.repeat(begin, len(chunks)),
        held=tuple(range(len(chunks), len(chunks) + len(held))),
        values=tuple(begin.tolist()) if held else (),
    )
    _check_start(spec, space.names, space.start, lower, upper)
    return space


def _bounds(spec: SpaceSpec, default: tuple[float, float]) -> tuple[float, float]:
    low, high = spec.bounds or default
    if not low < high:
        raise InputError(
            f"space.bounds: expected [low, high] with low < high, received [{low:g}, {high:g}]"
        )
    return float(low), float(high)


def _granularity(spec: SpaceSpec) -> Granularity:
    """Granularity of the groups, which under a curve are the blocks that it runs over."""
    assert spec.granularity != "chunk"
    if spec.depth is None:
        return spec.granularity or "block"
    if spec.granularity not in (None, "global", "task"):
        raise InputError(
            f"space.granularity: {spec.granularity!r} cannot be combined with space.depth; "
            "allowed with curves are 'global' and 'task' (separate attention and MLP curves: "
            "depth.modules: true)"
        )
    return "block_module" if spec.depth.modules else "block"


def _title(spec: SpaceSpec, granularity: Granularity) -> str:
    if spec.depth is None:
        return granularity
    shared = "shared " if spec.granularity == "global" else ""
    return f"{shared}{spec.depth.basis} curve" + (
        " x {attention, mlp}" if spec.depth.modules else ""
    )


def _excluded(patterns: Sequence[str], layout: Layout) -> frozenset[str]:
    excluded: set[str] = set()
    for text in patterns:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise InputError(
                f"space.exclude: expected a regular expression, received {text!r}: {error}"
            ) from None
        matched = [name for name in layout.names if pattern.search(name)]
        if not matched:
            raise InputError(
                f"space.exclude: {text!r} matches none of the {len(layout.names)} tensors; "
                f"names look like {layout.names[0]!r}"
            )
        excluded.update(matched)
    return frozenset(excluded)


def _box_of_coordinates(
    curves: Sequence[Curve], own: int, copies: int, low: float, high: float
) -> tuple[Point, Point]:
    boxes = [curve.basis.box(low, high) for curve in curves]
    lower = np.concatenate([*(box[0] for box in boxes), np.full(own, low)])
    upper = np.concatenate([*(box[1] for box in boxes), np.full(own, high)])
    return np.tile(lower, copies), np.tile(upper, copies)


def _start(
    spec: SpaceSpec, curves: Sequence[Curve], own: int, copies: int, dim: int, default: float
) -> Point:
    values = float(default) if spec.start is None else spec.start
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
            "per coordinate), "
            f"received a list of {given.size}"
        )
    constants = [curve.basis.constant(given) for curve in curves]
    return np.concatenate([*constants, np.repeat(given[:, None], own, axis=1)], axis=1).ravel()


def _check_start(
    spec: SpaceSpec, names: Sequence[str], start: Point, lower: Point, upper: Point
) -> None:
    outside = np.flatnonzero((start < lower) | (start > upper))
    if outside.size:
        index = int(outside[0])
        note = "" if spec.start is not None else " (the operator's default; set space.start)"
        raise InputError(
            f"space.start: expected {names[index]} in [{lower[index]:g}, {upper[index]:g}], "
            f"received {start[index]:g}{note}"
        )


def _box(
    spec: SpaceSpec, template: Recipe, low: float, high: float, default_start: float
) -> BoxSpace:
    given = [key for key in ("granularity", "chunks", "depth", "exclude") if getattr(spec, key)]
    if given:
        raise InputError(
            f"space.{given[0]}: only allowed with models; an analytic problem has dim, bounds and "
            "start"
        )
    if spec.dim is None or spec.dim < 1:
        raise InputError(f"space.dim: expected a whole number of at least 1, received {spec.dim}")
    values = float(default_start) if spec.start is None else spec.start
    start = (
        np.full(spec.dim, values, np.float64)
        if isinstance(values, float)
        else np.array(values, np.float64)
    )
    if start.size != spec.dim:
        raise InputError(
            f"space.start: expected a number or a list of {spec.dim}, received a list of "
            f"{start.size}"
        )
    box = BoxSpace(spec.dim, np.full(spec.dim, low), np.full(spec.dim, high), start, template)
    _check_start(spec, box.names, start, box.lower, box.upper)
    return box
