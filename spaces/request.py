"""What a space is built from, and the checks that several kinds of space share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergesearch.merging import InputError, Layout, Recipe
from mergesearch.spaces.base import Gram, Space

if TYPE_CHECKING:
    # pydantic is needed to read study files only.
    from mergesearch.spaces.section import BitsSpec, SpaceSpec

#: A ``space.bits`` section -> how much every layer matters ``(layers,)``.
Importance = Callable[["BitsSpec"], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class SpaceRequest:
    """A ``space`` section, with the merges that it is about.

    Attributes:
        section: The ``space`` section of the study file.
        template: The merge whose field the points replace; its field tells the number of
            directions.
        layout: Where the merged tensors lie; None for an analytic problem without weights.
        default_bounds: The operator's bounds of a coefficient.
        default_start: The operator's default coefficient.
        searched: What the strategy searches; see :class:`mergesearch.spaces.spec.SpaceKind`.
        change_sums: Gives Σ |task vector| of every expert and tensor of the layout
            ``(K, tensors)``. It reads weights, so it is called for chunks only.
        importance: Gives how much every layer matters by the measure that a section names,
            ``(layers,)``. It reads weights, so it is called for such a section only.
        gram: Gives the inner products of base and rows. It reads weights, so it is called only
            where a point needs angles.
    """

    section: SpaceSpec
    template: Recipe
    layout: Layout | None
    default_bounds: tuple[float, float]
    default_start: float
    searched: str = "coefficients"
    change_sums: Callable[[], npt.NDArray[np.float64]] | None = None
    gram: Gram | None = None
    importance: Importance | None = None

    @property
    def directions(self) -> int:
        """Number of directions."""
        return self.template.field.directions

    @property
    def model_layout(self) -> Layout:
        """The layout, for kinds of space that need a model."""
        assert self.layout is not None
        return self.layout


def coefficient_bounds(request: SpaceRequest) -> tuple[float, float]:
    """Bounds of every coefficient: those of the section, else the operator's.

    Raises:
        InputError: If they are not in order.
    """
    low, high = request.section.bounds or request.default_bounds
    if not low < high:
        raise InputError(
            f"space.bounds: expected [low, high] with low < high, received [{low:g}, {high:g}]"
        )
    return float(low), float(high)


def excluded_tensors(request: SpaceRequest) -> frozenset[str]:
    """Names of the tensors that stay at the base.

    Raises:
        InputError: If a pattern is no regular expression or matches nothing, or if the section
            gives ``dim``, which means nothing for a model.
    """
    layout = request.model_layout
    if request.section.dim is not None:
        raise InputError(
            f"space.dim: {request.section.dim}: only allowed for analytic problems; models have "
            "space.granularity"
        )
    excluded: set[str] = set()
    for text in request.section.exclude:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise InputError(
                f"space.exclude: expected a regular expression, received {text!r}: {error}"
            ) from None
        matches = [name for name in layout.names if pattern.search(name)]
        if not matches:
            raise InputError(
                f"space.exclude: {text!r} matches none of the {len(layout.names)} tensors; "
                f"names look like {layout.names[0]!r}"
            )
        excluded.update(matches)
    return frozenset(excluded)


def check_start(section: SpaceSpec, space: Space) -> None:
    """Refuse a start outside the bounds.

    Raises:
        InputError: If a coordinate of the start lies outside its bounds.
    """
    start = space.start
    outside = np.flatnonzero((start < space.lower) | (start > space.upper))
    if outside.size:
        index = int(outside[0])
        note = "" if section.start is not None else " (the operator's default; set space.start)"
        raise InputError(
            f"space.start: expected {space.names[index]} in "
            f"[{space.lower[index]:g}, {space.upper[index]:g}], "
            f"received {start[index]:g}{note}"
        )
