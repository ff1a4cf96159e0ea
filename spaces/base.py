"""What a search needs to know of a space, and what all spaces check and name in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, Recipe, RecipeError

Point = npt.NDArray[np.float64]

#: Boundaries of segments -> inner products of base and rows in each, ``(segments, K + 1, K + 1)``,
#: base first; a row is what a coefficient of 1 adds to the base
#: (:meth:`mergesearch.merging.resident.segment_gram.SegmentGram.gram`).
Gram = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]

#: Dashboards show this many numbers per trial at most.
SUMMARY_SIZE = 16


@dataclass(frozen=True)
class Row:
    """One line of the table that describes a space.

    Attributes:
        group: Label of the group or curve.
        tensors: Names of the tensors that share it.
        parameters: Number of their parameters.
        coefficients: Number of coordinates that they share.
    """

    group: str
    tensors: tuple[str, ...]
    parameters: int
    coefficients: int


class Space(Protocol):
    """What a search needs to know of a space. All arrays are float64 ``(dim,)``."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the coordinates, such as ``rotated/block 3/attention``."""

    @property
    def title(self) -> str:
        """What the space is, in a few words."""

    @property
    def lower(self) -> Point:
        """Lower bounds."""

    @property
    def upper(self) -> Point:
        """Upper bounds."""

    @property
    def start(self) -> Point:
        """Where a search begins; inside the bounds."""

    def field(self, point: Point) -> Field:
        """The coefficients at ``point``, in or out of the bounds. NaN and infinity pass through."""

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``."""

    def encode(self, field: Field) -> Point | None:
        """The point whose field equals ``field`` exactly, or None if the space does not hold it.

        The point may lie outside the bounds: a known merge need not be one that the search may
        propose.
        """

    def refine(self, point: Point, finer: Space) -> Point:
        """The point of ``finer`` with the same coefficients.

        They are the same to rounding where a curve has to be fitted. The point may lie outside the
        bounds of ``finer``.

        Raises:
            RecipeError: If ``finer`` cannot hold them.
        """

    def summary(self, point: Point) -> dict[str, float]:
        """At most 16 named numbers for dashboards, with the same names for every point."""

    def summary_of(self, field: Field) -> dict[str, float]:
        """The same numbers for any field; one that the space does not hold is approximated."""

    def table(self) -> tuple[Row, ...]:
        """Groups with their tensors, parameters and number of coefficients."""


@runtime_checkable
class DifferentiableSpace(Space, Protocol):
    """A space whose fields depend smoothly on the point."""

    def pull_back(self, point: Point, gradient: npt.NDArray[np.float64]) -> Point:
        """Gradient with respect to the point, by the chain rule.

        Args:
            point: ``(dim,)``.
            gradient: Gradient with respect to the values of ``field(point)``,
                ``(directions, segments)``.
        """


def check_point(point: Point, dim: int) -> Point:
    """``point`` as float64 ``(dim,)``.

    Raises:
        RecipeError: If it has another shape.
    """
    array = np.asarray(point, dtype=np.float64)
    if array.shape != (dim,):
        raise RecipeError(f"point: expected {dim} coordinates, received shape {array.shape}")
    return array


def fits(field: Field, directions: int, size: int) -> bool:
    """Whether ``field`` has this number of directions and of positions."""
    return field.directions == directions and field.size == size


def check_field(field: Field, directions: int, size: int) -> None:
    """Refuse a field of another shape.

    Raises:
        RecipeError: If ``field`` has another size or number of directions.
    """
    if not fits(field, directions, size):
        plural = "" if directions == 1 else "s"
        raise RecipeError(
            f"field: expected {directions} direction{plural} over {size} positions, "
            f"received {field.directions} over {field.size}"
        )


def check_gradient(gradient: npt.NDArray[np.float64], shape: tuple[int, int]) -> None:
    """Refuse a gradient of another shape than ``(directions, segments)``.

    Raises:
        RecipeError: If the shape differs.
    """
    if gradient.shape != shape:
        raise RecipeError(
            f"pull back: expected a gradient of shape {shape}, received {gradient.shape}"
        )


def direction_names(template: Recipe) -> tuple[str, ...]:
    """Names of the directions: those of the experts, or numbers where experts are fused.

    Behind the rows of its leader, a blend has one for every other member.
    """
    # Operators that fuse experts have directions of their own.
    others = template.options["members"][1:] if template.operator == "blend" else []
    directions = template.field.directions - len(others)
    ways = tuple(f"to {name}" for name in others)
    if len(template.experts) == directions:
        return tuple(expert.name for expert in template.experts) + ways
    return tuple(f"direction {index}" for index in range(directions)) + ways


def named_values(names: Iterable[str], point: Point) -> dict[str, float]:
    """Name -> coordinate."""
    return dict(zip(names, point.tolist(), strict=True))


def cannot_hold(finer: Space, what: str) -> RecipeError:
    """The error of a refinement into a space that does not hold ``what``."""
    return RecipeError(f"refine: a {finer.title} space cannot hold {what}")


def encode_in(finer: Space, field: Field, what: str) -> Point:
    """The point of ``finer`` whose field equals ``field`` exactly.

    Args:
        finer: The space to refine into.
        field: The coefficients.
        what: Describes the point that is refined, for the message.

    Raises:
        RecipeError: If ``finer`` does not hold the field.
    """
    point = finer.encode(field)
    if point is None:
        raise cannot_hold(finer, what)
    return point
