"""Which operator merges which layers, and how: methods and their parameters as conditional
dimensions.

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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, InputError, Layout, Recipe, RecipeError
from mergesearch.spaces.coefficient_space import SUMMARY_SIZE, Point, Row, Space, check_point
from mergesearch.spaces.mixed_dimensions import (
    METHODS,
    Cell,
    Coordinates,
    Dimension,
    Method,
    densities_of,
    grouped,
)
from mergesearch.spaces.partition import difference, weighted_mean
from mergesearch.spaces.segment_space import Gram

if TYPE_CHECKING:
    from mergesearch.merging.operators.stack import StackRows

#: Methods that a field is read as, the simplest first.
_READABLE: tuple[Method, ...] = ("task_arithmetic", "linear", "ties")

_Array = npt.NDArray[np.float64]


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
        gram: Inner products of base and rows, for the angles of arcs; asked only when a point with
            ``slerp`` is decoded, and read as far as the task vectors, the first K rows.
    """

    template: Recipe
    layout: Layout
    methods: tuple[Method, ...]
    groups: tuple[str, ...]
    cells: tuple[Cell, ...]
    dimensions: tuple[Dimension, ...]
    choices: tuple[int | None, ...]
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

    @cached_property
    def lower(self) -> Point:
        """Lower bounds."""
        return np.array([dimension.low for dimension in self.dimensions])

    @cached_property
    def upper(self) -> Point:
        """Upper bounds."""
        return np.array([dimension.high for dimension in self.dimensions])

    @cached_property
    def start(self) -> Point:
        """Task arithmetic at its default everywhere, which needs no angles (or the first method, in
        the middle).
        """
        from mergesearch.merging.operators import get_operator

        point = self._everywhere(
            "task_arithmetic" if "task_arithmetic" in self.methods else self.methods[0]
        )
        default = get_operator("task_arithmetic").default(len(self.template.experts), {})
        for cell in self.cells:
            point[cell.places.get("task_arithmetic", slice(0))] = default
        return self.canonical(point)

    @cached_property
    def seeds(self) -> tuple[Point, ...]:
        """Every expert by itself, as a linear merge with one weight, where ``linear`` is among the
        methods.
        """
        if "linear" not in self.methods:
            return ()
        seeds = []
        for weights in np.eye(len(self.template.experts)):
            point = self._everywhere("linear")
            for cell in self.cells:
                point[cell.places["linear"]] = weights
            seeds.append(self.canonical(point))
        return tuple(seeds)

    def method(self, point: Point, group: int) -> Method:
        """The method that a group has chosen."""
        place = self.choices[group]
        return self.methods[0 if place is None else self._codes(point)[place]]

    def active(self, points: Point) -> npt.NDArray[np.bool_]:
        """Which coordinates the merge depends on, for points ``(..., dim)``."""
        parents, values = self._conditions
        return np.asarray((parents < 0) | (self._codes(points)[..., parents] == values))

    def canonical(self, points: Point) -> Point:
        """The same merges, with choices in the middle of their bins and inactive coordinates at
        their fixed value.

        Points are ``(..., dim)``.
        """
        chosen = np.where(self._is_choice, self._codes(points) + 0.5, points)
        return np.where(self.active(points), chosen, self._middle)

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``."""
        return self.template.with_field(self.field(point))

    def field(self, point: Point) -> Field:
        """The coefficients at ``point``: one column per tensor. Parameters that are not finite pass
        through.

        Raises:
            RecipeError: If an arc is needed and there is nothing to take its angle from.
        """
        point = check_point(point, self.dim)
        values = np.zeros((self._rows.count, len(self._starts)))
        for cell, members in zip(self.cells, self._members, strict=True):
            method = self.method(point, cell.group)
            values[:, members] = self._columns(method, point[cell.places[method]], members)
        return Field(np.append(self._starts, self.layout.size), values).compact()

    def encode(self, field: Field) -> Point | None:
        """The point whose field equals ``field`` exactly, or None; arcs are not recognised."""
        if field.directions != self._rows.count or field.size != self.layout.size:
            return None
        fine = field.refine(np.append(self._starts, self.layout.size))
        if fine.segments != len(self._starts):
            return None
        columns = [None if not m.size else fine.values[:, m[0]] for m in self._members]
        point = self._middle.copy()
        for group in range(len(self.groups)):
            if not self._read_group(group, columns, point):
                return None
        return point if difference(self.field(point), field) == 0.0 else None

    def refine(self, point: Point, finer: Space) -> Point:
        """The point of ``finer`` with the same coefficients; it may lie outside the bounds of
        ``finer``.

        Raises:
            RecipeError: If ``finer`` cannot hold them.
        """
        if isinstance(finer, MixedSpace) and finer.dimensions == self.dimensions:
            return self.canonical(check_point(point, self.dim))
        found = finer.encode(self.field(point))
        if found is None:
            raise RecipeError(
                f"refine: a {finer.title} space cannot hold a point of a {self.title} space"
            )
        return found

    def summary(self, point: Point) -> dict[str, float]:
        """Mean coefficients, with the same names for every point."""
        return self.summary_of(self.field(point))

    def summary_of(self, field: Field) -> dict[str, float]:
        """Mean coefficient of each task vector (the first eight), of TIES at each density, and of
        the base.

        Raises:
            RecipeError: If ``field`` has another size or number of directions.
        """
        if field.directions != self._rows.count or field.size != self.layout.size:
            raise RecipeError(
                f"field: expected {self._rows.count} directions over {self.layout.size} positions, "
                f"received {field.directions} over {field.size}"
            )
        width = np.diff(field.boundaries).astype(np.float64)
        means = np.array([weighted_mean(row, width) for row in field.values])
        experts = zip(self.template.experts[:8], means, strict=False)
        summary = {f"expert {expert.name}": float(mean) for expert, mean in experts}
        for place, density in enumerate(self._densities[: SUMMARY_SIZE - len(summary) - 1]):
            summary[f"ties {density:g}"] = float(means[self._rows.trimmed(place)].mean())
        return summary | {"base": float(means[self._rows.base])}

    def table(self) -> tuple[Row, ...]:
        """Groups with their tensors, parameters and coordinates."""
        rows = []
        for group, name in enumerate(self.groups):
            cells = [cell for cell in self.cells if cell.group == group]
            own = sum(place.stop - place.start for cell in cells for place in cell.places.values())
            tensors = tuple(name for cell in cells for name in cell.tensors)
            parameters = sum(cell.parameters for cell in cells)
            rows.append(Row(name, tensors, parameters, own + (self.choices[group] is not None)))
        return tuple(rows)

    # --- coefficients of a cell
    # ------------------------------------------------------------------------

    def _columns(self, method: Method, values: _Array, members: npt.NDArray[np.intp]) -> _Array:
        """Coefficients of a cell's tensors, ``(directions, 1 or tensors)``."""
        if method == "slerp":
            return self._arc_columns(values, members)
        column = np.zeros((self._rows.count, 1))
        rows = self._rows
        if method == "linear":
            column[rows.tasks, 0] = _normalised(values)
        elif method == "task_arithmetic":
            column[rows.tasks] = values[0]
        else:
            column[rows.trimmed(_code(values[0], len(self._densities)))] = values[1]
        return column

    def _arc_columns(self, scores: _Array, members: npt.NDArray[np.intp]) -> _Array:
        from mergesearch.merging.operators.stack import arc_weights

        columns = np.zeros((self._rows.count, members.size))
        if not np.all(np.isfinite(scores)):
            columns[self._rows.tasks] = np.nan
            return columns
        one, other = np.argsort(-scores, kind="stable")[:2]
        share = _normalised(scores[[one, other]])[1]
        a, b = arc_weights(self._products[members], int(one), int(other), float(share))
        columns[one] = a
        columns[other] = b
        columns[self._rows.base] = a + b - 1.0
        return columns

    @cached_property
    def _products(self) -> _Array:
        """Inner products of base and task vectors on every tensor, ``(tensors, 1 + K, 1 + K)``."""
        if self.gram is None:
            raise RecipeError(
                "space: slerp needs the angles between experts, received no weights to take them "
                "from; "
                "leave slerp out of the methods, or give the space `gram`"
            )
        size = 1 + len(self.template.experts)
        found = self.gram(np.append(self._starts, self.layout.size))
        if found.ndim != 3 or len(found) != len(self._starts) or min(found.shape[1:]) < size:
            expected = (len(self._starts), size, size)
            raise RecipeError(f"space: expected inner products {expected}, received {found.shape}")
        return np.asarray(found[:, :size, :size], np.float64)

    # --- reading a field
    # ------------------------------------------------------------------------

    def _read_group(self, group: int, columns: Sequence[_Array | None], point: Point) -> bool:
        """Write the coordinates of a group into ``point``; False if no method gives its columns."""
        cells = [
            (cell, column)
            for cell, column in zip(self.cells, columns, strict=True)
            if cell.group == group
        ]
        for method in (known for known in _READABLE if known in self.methods):
            read = [None if column is None else self._read(method, column) for _, column in cells]
            if all(
                values is not None or column is None
                for values, (_, column) in zip(read, cells, strict=True)
            ):
                place = self.choices[group]
                if place is not None:
                    point[place] = self.methods.index(method) + 0.5
                for values, (cell, _) in zip(read, cells, strict=True):
                    if values is not None:
                        point[cell.places[method]] = values
                return True
        return False

    def _read(self, method: Method, column: _Array) -> list[float] | None:
        """Parameters under which ``method`` gives a column, if there are any; to be checked."""
        rows = self._rows
        used = np.flatnonzero(column)
        tasks = column[rows.tasks]
        if method == "ties":
            place = int(used[0]) // rows.experts - 1 if used.size else 0
            return (
                [place + 0.5, float(column[rows.trimmed(max(place, 0))][0])] if place >= 0 else None
            )
        if used.size and used[-1] >= rows.experts:
            return None
        if method == "linear":
            return tasks.tolist() if abs(tasks.sum() - 1.0) < 1e-12 else None
        return [float(tasks[0])] if np.all(tasks == tasks[0]) else None

    # --- constants
    # ------------------------------------------------------------------------

    def _everywhere(self, method: Method) -> Point:
        """The point with one method in all groups, its parameters in the middle."""
        point = self._middle.copy()
        for place in self.choices:
            if place is not None:
                point[place] = self.methods.index(method) + 0.5
        return point

    def _codes(self, points: Point) -> npt.NDArray[np.int64]:
        """Number of the choice of each dimension, ``(..., dim)``; 0 for real ones."""
        finite = np.where(np.isfinite(points), points, 0.0)
        codes = np.clip(np.floor(finite), 0, self._counts - 1).astype(np.int64)
        return np.where(self._is_choice, codes, 0)

    @cached_property
    def _counts(self) -> npt.NDArray[np.int64]:
        return np.array([max(len(dimension.choices), 1) for dimension in self.dimensions], np.int64)

    @cached_property
    def _is_choice(self) -> npt.NDArray[np.bool_]:
        return np.array([dimension.kind != "real" for dimension in self.dimensions])

    @cached_property
    def _middle(self) -> Point:
        return np.array([dimension.middle for dimension in self.dimensions])

    @cached_property
    def _conditions(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        """Parent (-1: none) and number of its choice for each dimension."""
        conditions = [dimension.condition or (-1, 0) for dimension in self.dimensions]
        return np.array([parent for parent, _ in conditions], np.intp), np.array(
            [value for _, value in conditions]
        )

    @cached_property
    def _densities(self) -> list[float]:
        return densities_of(self.template)

    @cached_property
    def _rows(self) -> StackRows:
        from mergesearch.merging.operators.stack import StackRows

        return StackRows(len(self.template.experts), len(self._densities))

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """Where the tensors that hold anything start ``(tensors,)``."""
        return np.array([spec.start for spec in self.layout.tensors if spec.size], np.int64)

    @cached_property
    def _members(self) -> tuple[npt.NDArray[np.intp], ...]:
        """Which of the tensors that hold anything belong to each cell."""
        sized = [spec.name for spec in self.layout.tensors if spec.size]
        number = {name: place for place, name in enumerate(sized)}
        return tuple(
            np.array([number[n] for n in cell.tensors if n in number], np.intp)
            for cell in self.cells
        )


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
    builder = Coordinates(template, tuple(methods))
    for name, members in grouped(layout, layers).items():
        builder.add(name, members, layout)
    return MixedSpace(
        template,
        layout,
        tuple(methods),
        tuple(builder.groups),
        tuple(builder.cells),
        tuple(builder.dimensions),
        tuple(builder.choices),
        gram,
    )


def _code(value: float, count: int) -> int:
    """Number of the choice that a coordinate stands for."""
    return int(np.clip(math.floor(value), 0, count - 1)) if math.isfinite(value) else 0


def _normalised(values: _Array) -> _Array:
    """Positive parts divided by their sum; uniform where all are zero."""
    positive = np.maximum(values, 0.0)
    total = positive.sum()
    with np.errstate(invalid="ignore"):
        return np.full(values.size, 1.0 / values.size) if total == 0.0 else positive / total
