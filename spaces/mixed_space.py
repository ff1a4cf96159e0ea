"""Which method merges which layers, and how: choices and parameters as conditional dimensions.

The space of Yang 2025, "MedSAMix: a training-free model merging approach for medical image
segmentation", over the rows of the operator ``stack``: consecutive groups of blocks each choose one
of four methods, and inside a group attention, MLP and everything else have parameters of their own
for it. What lies outside the blocks is a last group.

* ``linear``: weights, one per expert, normalised to sum to 1 (all zero: uniform).
* ``task_arithmetic``: one scale of the sum of task vectors.
* ``ties``: a density among those of the stack, and a scale.
* ``slerp``: scores, one per expert; the two experts with the largest are joined along the arc
  between their full weights, the weight of the second being s2 / (s1 + s2). So both ends are
  reached, which the softmax of the authors' code, confined to [0.27, 0.73], does not allow.

Parameters of methods that are not chosen are inactive: the merge does not depend on them, and
:meth:`canonical` gives them one fixed value, so that they carry no information. (In the authors'
code they stay as dimensions of noise.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, InputError, Layout, Recipe
from mergesearch.spaces.base import (
    Gram,
    Point,
    Row,
    Space,
    check_field,
    check_point,
    encode_in,
    fits,
)
from mergesearch.spaces.parts.conditional_box import ConditionalBox, Dimension
from mergesearch.spaces.parts.mixed_dimensions import (
    METHODS,
    Cell,
    Method,
    MixedDimensions,
    tensors_by_group,
)
from mergesearch.spaces.parts.partition import difference
from mergesearch.spaces.parts.stack_columns import StackColumns
from mergesearch.spaces.request import SpaceRequest


@dataclass(frozen=True, eq=False)
class MixedSpace:
    """A method for every group of layers, and its parameters for every part of the group.

    Attributes:
        template: The merge whose field is replaced; its operator is ``stack``.
        layout: Where the tensors lie.
        methods: The methods to choose from.
        groups: Names of the groups.
        cells: Tensors that share parameters; together all tensors.
        dimensions: The coordinates.
        choices: Coordinate of each group's method; None where there is only one.
        lower, upper, start: float64 ``(dim,)``.
        seeds: Every expert by itself, as a linear merge with one weight; empty where ``linear`` is
            not among the methods.
        gram: Inner products of base and rows, for the angles of arcs; called only when a point with
            ``slerp`` is decoded, and read as far as the task vectors, the first K rows.
    """

    template: Recipe
    layout: Layout
    methods: tuple[Method, ...]
    groups: tuple[str, ...]
    cells: tuple[Cell, ...]
    dimensions: tuple[Dimension, ...]
    choices: tuple[int | None, ...]
    lower: Point
    upper: Point
    start: Point
    seeds: tuple[Point, ...]
    gram: Gram | None = None

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return len(self.dimensions)

    @property
    def title(self) -> str:
        """What the space is, in a few words."""
        return f"mixed, {len(self.methods)} methods for {len(self.groups)} groups"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the coordinates, such as ``blocks 0-1/attention/slerp rotated``."""
        return tuple(dimension.name for dimension in self.dimensions)

    def method(self, point: Point, group: int) -> Method:
        """The method that a group has chosen."""
        choice = self.choices[group]
        return self.methods[0 if choice is None else self._box.codes(point)[choice]]

    def active(self, points: Point) -> npt.NDArray[np.bool_]:
        """Which coordinates the merge depends on, for points ``(..., dim)``."""
        return self._box.active(points)

    def canonical(self, points: Point) -> Point:
        """The same merges, with fixed values for what they do not depend on.

        Choices are in the middle of their bins, and inactive coordinates at their fixed value.
        Points are ``(..., dim)``.
        """
        return self._box.canonical(points)

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``."""
        return self.template.with_field(self.field(point))

    def field(self, point: Point) -> Field:
        """The coefficients at ``point``: one column per tensor.

        Parameters that are not finite pass through.

        Raises:
            RecipeError: If an arc is needed and there is nothing to take its angle from.
        """
        point = check_point(point, self.dim)
        columns = self._columns
        values = np.zeros((columns.rows.count, len(columns.boundaries) - 1))
        for cell, members in zip(self.cells, columns.members, strict=True):
            method = self.method(point, cell.group)
            values[:, members] = columns.of_cell(method, point[cell.slices[method]], members)
        return Field(columns.boundaries, values).compact()

    def encode(self, field: Field) -> Point | None:
        """The point whose field equals ``field`` exactly, or None; arcs are not recognised."""
        columns = self._columns
        if not fits(field, columns.rows.count, self.layout.size):
            return None
        fine = field.refine(columns.boundaries)
        if fine.segments != len(columns.boundaries) - 1:
            return None
        point = self._box.middle.copy()
        for group, choice in enumerate(self.choices):
            cells = [
                pair
                for pair in zip(self.cells, columns.members, strict=True)
                if pair[0].group == group
            ]
            read = columns.read(
                self.methods,
                [fine.values[:, members[0]] if members.size else None for _, members in cells],
            )
            if read is None:
                return None
            method, values = read
            if choice is not None:
                point[choice] = self.methods.index(method) + 0.5
            for (cell, _), parameters in zip(cells, values, strict=True):
                if parameters is not None:
                    point[cell.slices[method]] = parameters
        return point if difference(self.field(point), field) == 0.0 else None

    def refine(self, point: Point, finer: Space) -> Point:
        """The point of ``finer`` with the same coefficients; it may lie outside its bounds.

        Raises:
            RecipeError: If ``finer`` cannot hold them.
        """
        if isinstance(finer, MixedSpace) and finer.dimensions == self.dimensions:
            return self.canonical(check_point(point, self.dim))
        return encode_in(finer, self.field(point), f"a point of a {self.title} space")

    def summary(self, point: Point) -> dict[str, float]:
        """Mean coefficients, with the same names for every point."""
        return self.summary_of(self.field(point))

    def summary_of(self, field: Field) -> dict[str, float]:
        """Mean coefficients of the first eight task vectors, of each density, and of the base.

        Raises:
            RecipeError: If ``field`` has another size or number of directions.
        """
        check_field(field, self._columns.rows.count, self.layout.size)
        return self._columns.summary(field)

    def table(self) -> tuple[Row, ...]:
        """Groups with their tensors, parameters and coordinates."""
        rows = []
        for group, name in enumerate(self.groups):
            cells = [cell for cell in self.cells if cell.group == group]
            own = sum(part.stop - part.start for cell in cells for part in cell.slices.values())
            tensors = tuple(tensor for cell in cells for tensor in cell.tensors)
            parameters = sum(cell.parameters for cell in cells)
            rows.append(Row(name, tensors, parameters, own + (self.choices[group] is not None)))
        return tuple(rows)

    @cached_property
    def _box(self) -> ConditionalBox:
        return ConditionalBox(self.dimensions)

    @cached_property
    def _columns(self) -> StackColumns:
        return StackColumns(self.template, self.layout, self.cells, self.gram)


def mixed_space(
    template: Recipe,
    layout: Layout,
    *,
    layers: int = 2,
    methods: Sequence[Method] = METHODS,
    gram: Gram | None = None,
) -> MixedSpace:
    """The space over a layout.

    Args:
        template: The merge whose field the points replace; its operator must be ``stack``.
        layout: Where the merged tensors lie.
        layers: Blocks per group; where it does not divide their number, the last group is smaller.
        methods: The methods to choose from.
        gram: Where arcs get their angles from.

    Raises:
        InputError: If the operator is another, no block is recognised, or a value is not allowed.
    """
    if template.operator != "stack":
        raise InputError(
            f"operator: the mixed space expects 'stack', received {template.operator!r}; set it"
        )
    if layers < 1:
        raise InputError(f"space.layers: expected at least 1 block per group, received {layers}")
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods or len(set(methods)) != len(methods):
        raise InputError(
            f"space.methods: expected different ones of {list(METHODS)}, received {list(methods)}"
        )
    collected = MixedDimensions(template, tuple(methods))
    for name, members in tensors_by_group(layout, layers).items():
        collected.add(name, members, layout)
    box = ConditionalBox(tuple(collected.dimensions))
    return MixedSpace(
        template,
        layout,
        tuple(methods),
        tuple(collected.groups),
        tuple(collected.cells),
        box.dimensions,
        tuple(collected.choices),
        lower=box.lower,
        upper=box.upper,
        start=_start(collected, template, methods),
        seeds=_seeds(collected, template, methods),
        gram=gram,
    )


def build_mixed_space(request: SpaceRequest) -> MixedSpace:
    """The space over groups of two blocks, or as many as the section says.

    Raises:
        InputError: If the operator is not ``stack``, or no block is recognised.
    """
    return mixed_space(
        request.template,
        request.model_layout,
        layers=request.section.layers or 2,
        gram=request.gram,
    )


def _start(collected: MixedDimensions, template: Recipe, methods: Sequence[Method]) -> Point:
    """Task arithmetic at its default everywhere, which needs no angles.

    Where it is not among the methods: the first of them, with its parameters in the middle.
    """
    from mergesearch.merging.operators import get_operator

    if "task_arithmetic" not in methods:
        return collected.point(methods[0], None)
    default = get_operator("task_arithmetic").default(len(template.experts), {})
    return collected.point("task_arithmetic", default)


def _seeds(
    collected: MixedDimensions, template: Recipe, methods: Sequence[Method]
) -> tuple[Point, ...]:
    if "linear" not in methods:
        return ()
    return tuple(collected.point("linear", weights) for weights in np.eye(len(template.experts)))
