"""Boxes of few coordinates inside a box of many: groups that move as one, and directions of a path.

A point of the coarse box is an offset from a centre::

    x = clip(centre + width * U z),    columns of U of length 1 in the largest coordinate      (1)

The box of all coordinates holds every point of a coarse one, so what a coarse search found is where
the finer one begins, exactly.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.search.strategies.base import Point, Problem, TrialResult
from mergesearch.spaces import CoefficientSpace

Array = npt.NDArray[np.float64]

#: A point lies in the span if what is left of it is below this fraction of the box.
IN_SPAN = 1e-6
#: A direction is spanned by others if what they leave of it is below this fraction.
SPANNED = 1e-6
#: Groups of a coarse box at most.
MOST_COARSE = 128
#: Principal directions of the path that are searched.
PATH_DIRECTIONS = 3


@dataclass(frozen=True, eq=False)
class CoarseBox:
    """A box of offsets from a centre.

    Attributes:
        fine: The problem that it is part of.
        centre: ``(dim,)``.
        columns: U of (1), ``(dim, k)``; None: every coordinate by itself.
        half: Half-width of the coarse box, as a fraction of the fine one.
    """

    fine: Problem
    centre: Point
    columns: Array | None
    half: float

    def problem(self, budget: int, results: Sequence[TrialResult]) -> Problem:
        """The problem in the coarse coordinates; known results that lie in it are its anchors."""
        anchors = [
            replace(result, id=None, point=point)
            for result in results
            if (point := self.to_coarse(result.point)) is not None
        ]
        lower, upper = self._bounds()
        start = self.centre if self.columns is None else np.zeros(lower.size)
        return replace(
            self.fine,
            lower=lower,
            upper=upper,
            start=start,
            origin=start,
            budget=budget,
            anchors=tuple(anchors),
            space=self.fine.space if self.columns is None else None,
        )

    def to_fine(self, point: Point) -> Point:
        """Coarse coordinates to the point of the box that they stand for (1)."""
        if self.columns is None:
            return point
        moved = self.centre + self.fine.width * (self.columns @ point)
        return np.asarray(np.clip(moved, self.fine.lower, self.fine.upper))

    def to_coarse(self, point: Point) -> Point | None:
        """The coarse coordinates of a point, or None where the coarse box does not hold it."""
        lower, upper = self._bounds()
        if self.columns is None:
            coarse = point
        else:
            width = np.where(self.fine.width > 0, self.fine.width, 1.0)
            offset = (point - self.centre) / width
            coarse = self._inverse @ offset
            if np.max(np.abs(self.columns @ coarse - offset), initial=0.0) > IN_SPAN:
                return None
        return coarse if bool(np.all((coarse >= lower) & (coarse <= upper))) else None

    @cached_property
    def _inverse(self) -> Array:
        """Pseudo-inverse of the columns ``(k, dim)``."""
        assert self.columns is not None
        return np.asarray(np.linalg.pinv(self.columns), np.float64)

    def _bounds(self) -> tuple[Point, Point]:
        if self.columns is None:
            reach = self.half * self.fine.width
            return (
                np.maximum(self.fine.lower, self.centre - reach),
                np.minimum(self.fine.upper, self.centre + reach),
            )
        size = np.full(self.columns.shape[1], self.half)
        return -size, size


def coarse_levels(problem: Problem, path: Sequence[Point]) -> list[Array | None]:
    """Columns of ever finer boxes ``(dim, k)``; None for the last, that of all coordinates.

    A level that saves less than half of the coordinates is left out.
    """
    free = int(np.sum(problem.width > 0))
    levels: list[Array | None] = []
    fewest = 0
    for partitions in coordinate_labels(problem):
        if sum(len(set(labels)) for labels in partitions) > MOST_COARSE:
            continue
        columns = independent(group_columns(problem, partitions) + path_directions(problem, path))
        if fewest < columns.shape[1] <= free / 2:
            levels.append(columns)
            fewest = columns.shape[1]
    return [*levels, None]


def group_columns(problem: Problem, partitions: Sequence[Sequence[Hashable]]) -> list[Array]:
    """A direction for each group of each partition, along which its coordinates move as one."""
    free = problem.width > 0
    columns = [
        np.where(free & np.array([own == label for own in labels]), 1.0, 0.0)
        for labels in partitions
        for label in dict.fromkeys(labels)
    ]
    return [column for column in columns if np.any(column)]


def independent(columns: Sequence[Array]) -> Array:
    """Those columns ``(dim, k)`` that the ones before do not span; their largest entry is 1."""
    kept: list[Array] = []
    spanned = np.zeros((columns[0].size if columns else 0, 0))  # orthonormal
    for column in columns:
        rest = column - spanned @ (spanned.T @ column)
        if np.linalg.norm(rest) > SPANNED * np.linalg.norm(column):
            kept.append(column / np.max(np.abs(column)))
            spanned = np.column_stack([spanned, rest / np.linalg.norm(rest)])
    return np.array(kept).T if kept else spanned


def coordinate_labels(problem: Problem) -> list[list[list[Hashable]]]:
    """From coarse to fine, the partitions of the coordinates whose groups move as one.

    First tasks and blocks, then the blocks of each task, then its tensors; without a space of
    coefficients, all coordinates.
    """
    space = problem.space
    if not isinstance(space, CoefficientSpace):
        return [[["all"] * problem.dim]]
    groups = {group.name: group for group in space.groups}
    blocks: list[Hashable] = []
    tensors: list[Hashable] = []
    for label in space.coordinates.labels:
        group = groups.get(label)
        outside = group is None or group.depth is None
        blocks.append(label if outside or group is None else group.depth)
        tensors.append(label if group is None else group.tensors)
    rows = range(problem.dim // len(blocks))
    tasks: list[Hashable] = [row for row in rows for _ in blocks]
    return [
        [tasks, [block for _ in rows for block in blocks]],
        [[(row, block) for row in rows for block in blocks]],
        [[(row, tensor) for row in rows for tensor in tensors]],
    ]


def path_directions(problem: Problem, path: Sequence[Point]) -> list[Array]:
    """Principal directions of the path's points, as fractions of the box ``(dim,)`` each."""
    if len(path) < 3:
        return []
    width = np.where(problem.width > 0, problem.width, 1.0)
    offsets = (np.array(path) - np.mean(path, axis=0)) / width
    _, sizes, rows = np.linalg.svd(offsets, full_matrices=False)
    return [row for row, size in zip(rows[:PATH_DIRECTIONS], sizes, strict=False) if size > 1e-9]
