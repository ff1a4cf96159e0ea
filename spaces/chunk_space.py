"""The space of chunks: coefficients of parts of tensors.

:mod:`mergesearch.spaces.parts.chunks` says how tensors are cut. Tensors of no chunk are held at the
coefficient that the search starts with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergesearch.merging import InputError
from mergesearch.spaces.base import Point
from mergesearch.spaces.coefficient_space import CoefficientSpace
from mergesearch.spaces.groups import Group
from mergesearch.spaces.parts.chunks import chunk_counts, chunk_groups, importance, tensors_of
from mergesearch.spaces.request import (
    SpaceRequest,
    check_start,
    coefficient_bounds,
    excluded_tensors,
)
from mergesearch.spaces.section import ChunkSpec


def build_chunk_space(request: SpaceRequest) -> CoefficientSpace:
    """The space over chunks of tensors; reads how much the experts change each tensor.

    Raises:
        InputError: If curves are given too, the start does not fit, or no chunk is left.
    """
    low, high = coefficient_bounds(request)
    excluded = excluded_tensors(request)
    if request.section.depth is not None:
        raise InputError("space.granularity: 'chunk' cannot be combined with space.depth")
    if request.section.groups:
        raise InputError(
            "space.granularity: 'chunk' cannot be combined with space.groups; choose 'tensor'"
        )
    start = _start_per_direction(request)
    chunks, held = _chunks(request, excluded, start)
    size = request.directions * len(chunks)
    space = CoefficientSpace(
        template=request.template,
        layout=request.model_layout,
        title="chunk",
        groups=(*chunks, *held),
        lower=np.full(size, low),
        upper=np.full(size, high),
        start=np.repeat(start, len(chunks)),
        held=tuple(range(len(chunks), len(chunks) + len(held))),
        values=tuple(start.tolist()) if held else (),
    )
    check_start(request.section, space)
    return space


def _start_per_direction(request: SpaceRequest) -> Point:
    """Coefficient of each direction where the search begins ``(directions,)``."""
    given = request.section.start
    values = request.default_start if given is None else given
    if np.size(values) not in (1, request.directions):
        raise InputError(
            f"space.start: expected a number or a list of {request.directions} (one per expert), "
            "for chunks"
        )
    return np.broadcast_to(np.asarray(values, np.float64), request.directions)


def _chunks(
    request: SpaceRequest, excluded: frozenset[str], start: Point
) -> tuple[Sequence[Group], Sequence[Group]]:
    """A group for every chunk, and the tensors of no chunk."""
    assert request.change_sums is not None
    layout = request.model_layout
    section = request.section.chunks or ChunkSpec()
    sums = request.change_sums()
    whole = tensors_of(layout, excluded)
    columns = {name: index for index, name in enumerate(layout.names)}
    of_tensors = sums[:, [columns[group.tensors[0]] for group in whole]]
    # Directions of fused operators are no experts: each of their experts weighs the same.
    share = importance(of_tensors, start if len(start) == len(sums) else np.ones(len(sums)))
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
    return chunks, held
