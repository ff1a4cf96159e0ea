"""From methods to coefficients of the operator ``stack``, and back.

A column holds the coefficients of one tensor ``(directions,)``, in the order of
:class:`mergesearch.merging.operators.stack.StackRows`. See :mod:`mergesearch.spaces.mixed_space`
for what each method gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, Layout, Recipe, RecipeError
from mergesearch.spaces.base import SUMMARY_SIZE, Gram
from mergesearch.spaces.parts.mixed_dimensions import Cell, Method, densities_of
from mergesearch.spaces.parts.partition import weighted_mean

if TYPE_CHECKING:
    from mergesearch.merging.operators.stack import StackRows

#: Methods that a field is read as, the simplest first.
_READABLE: tuple[Method, ...] = ("task_arithmetic", "linear", "ties")

#: Experts with a mean of their own in a summary.
_SUMMARISED = 8

_Array = npt.NDArray[np.float64]
_Index = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class StackColumns:
    """Columns of the cells of a layout.

    Attributes:
        template: The merge; its operator is ``stack``.
        layout: Where the tensors lie.
        cells: Tensors that share parameters.
        gram: Inner products of base and rows, for the angles of arcs; None where there are none.
    """

    template: Recipe
    layout: Layout
    cells: tuple[Cell, ...]
    gram: Gram | None

    @cached_property
    def rows(self) -> StackRows:
        """Which of the directions belong to each method."""
        from mergesearch.merging.operators.stack import StackRows

        return StackRows(len(self.template.experts), len(self._densities))

    @cached_property
    def boundaries(self) -> npt.NDArray[np.int64]:
        """Starts of the tensors that are not empty, then the size of the layout."""
        starts = np.array([spec.start for spec in self.layout.tensors if spec.size], np.int64)
        return np.append(starts, self.layout.size)

    @cached_property
    def members(self) -> tuple[_Index, ...]:
        """Which of the tensors that are not empty belong to each cell."""
        sized = [spec.name for spec in self.layout.tensors if spec.size]
        number = {name: index for index, name in enumerate(sized)}
        return tuple(
            np.array([number[name] for name in cell.tensors if name in number], np.intp)
            for cell in self.cells
        )

    def of_cell(self, method: Method, values: _Array, members: _Index) -> _Array:
        """Columns of a cell's tensors, ``(directions, 1 or tensors)``.

        Args:
            method: The method.
            values: Its parameters.
            members: The tensors.

        Raises:
            RecipeError: If an arc is needed and there is nothing to take its angle from.
        """
        if method == "slerp":
            return self._arc_columns(values, members)
        column = np.zeros((self.rows.count, 1))
        if method == "linear":
            column[self.rows.tasks, 0] = _normalised(values)
        elif method == "task_arithmetic":
            column[self.rows.tasks] = values[0]
        else:
            column[self.rows.trimmed(_code(values[0], len(self._densities)))] = values[1]
        return column

    def read(
        self, methods: Sequence[Method], columns: Sequence[_Array | None]
    ) -> tuple[Method, list[list[float] | None]] | None:
        """The method of a group, with its parameters in every cell; None if there is none.

        Arcs are not recognised, and the parameters are to be checked.

        Args:
            methods: The methods to choose from.
            columns: Column of each cell; None for cells without parameters, which have no say.
        """
        for method in (known for known in _READABLE if known in methods):
            values = [
                None if column is None else self._read_column(method, column) for column in columns
            ]
            if all(
                parameters is not None or column is None
                for parameters, column in zip(values, columns, strict=True)
            ):
                return method, values
        return None

    def summary(self, field: Field) -> dict[str, float]:
        """Mean coefficients of the first eight task vectors, of each density, and of the base."""
        width = np.diff(field.boundaries).astype(np.float64)
        means = np.array([weighted_mean(row, width) for row in field.values])
        experts = zip(self.template.experts[:_SUMMARISED], means, strict=False)
        summary = {f"expert {expert.name}": float(mean) for expert, mean in experts}
        for index, density in enumerate(self._densities[: SUMMARY_SIZE - len(summary) - 1]):
            summary[f"ties {density:g}"] = float(means[self.rows.trimmed(index)].mean())
        return summary | {"base": float(means[self.rows.base])}

    @cached_property
    def _densities(self) -> list[float]:
        return densities_of(self.template)

    def _arc_columns(self, scores: _Array, members: _Index) -> _Array:
        """Columns of the arc between the two experts with the largest scores."""
        from mergesearch.merging.operators.stack import arc_weights

        columns = np.zeros((self.rows.count, members.size))
        if not np.all(np.isfinite(scores)):
            columns[self.rows.tasks] = np.nan
            return columns
        one, other = np.argsort(-scores, kind="stable")[:2]
        share = _normalised(scores[[one, other]])[1]
        a, b = arc_weights(self._products[members], int(one), int(other), float(share))
        columns[one] = a
        columns[other] = b
        columns[self.rows.base] = a + b - 1.0
        return columns

    @cached_property
    def _products(self) -> _Array:
        """Inner products of base and task vectors on every tensor, ``(tensors, 1 + K, 1 + K)``."""
        if self.gram is None:
            raise RecipeError(
                "space: slerp needs the angles between experts, received no weights to take them "
                "from; leave slerp out of the methods, or give the space `gram`"
            )
        size = 1 + len(self.template.experts)
        tensors = len(self.boundaries) - 1
        products = self.gram(self.boundaries)
        if products.ndim != 3 or len(products) != tensors or min(products.shape[1:]) < size:
            raise RecipeError(
                f"space: expected inner products {(tensors, size, size)}, received {products.shape}"
            )
        return np.asarray(products[:, :size, :size], np.float64)

    def _read_column(self, method: Method, column: _Array) -> list[float] | None:
        """Parameters under which ``method`` gives a column, if there are any; to be checked."""
        rows = self.rows
        used = np.flatnonzero(column)
        tasks = column[rows.tasks]
        if method == "ties":
            density = int(used[0]) // rows.experts - 1 if used.size else 0
            if density < 0:
                return None
            return [density + 0.5, float(column[rows.trimmed(density)][0])]
        if used.size and used[-1] >= rows.experts:
            return None
        if method == "linear":
            return tasks.tolist() if abs(tasks.sum() - 1.0) < 1e-12 else None
        return [float(tasks[0])] if np.all(tasks == tasks[0]) else None


def _code(value: float, count: int) -> int:
    """Number of the choice that a coordinate stands for."""
    return int(np.clip(math.floor(value), 0, count - 1)) if math.isfinite(value) else 0


def _normalised(values: _Array) -> _Array:
    """Positive parts divided by their sum; uniform where all are zero."""
    positive = np.maximum(values, 0.0)
    total = positive.sum()
    with np.errstate(invalid="ignore"):
        return np.full(values.size, 1.0 / values.size) if total == 0.0 else positive / total
