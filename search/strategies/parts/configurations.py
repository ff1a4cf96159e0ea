"""Configurations with real, integer and categorical coordinates, some of them inactive.

A space with ``dimensions`` says which coordinates are real numbers and which are choices, and which
are active in a configuration. In a plain box all coordinates are real and active.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.search.strategies.base import Point, Problem
from mergesearch.search.strategies.parts.sampling import reflect

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: Bound on candidates per round, and on their numbers altogether.
CANDIDATES = 300
NUMBERS = 150_000


class ConfigurationSpace:
    """The configurations of a box, how they are varied, and how a forest sees them.

    Args:
        problem: The box; its space may have ``dimensions``, ``canonical`` and ``active``.
        rng: Source of all randomness.

    Attributes:
        start: Where the search begins, canonical ``(dim,)``.
        size: Candidates of a round.
    """

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self._rng = rng
        self._lower = problem.lower
        self._upper = problem.upper
        self._width = problem.width
        dimensions = getattr(problem.space, "dimensions", None)
        self._space: Any = None if dimensions is None else problem.space
        if dimensions is None:
            kinds = np.array(["real"] * problem.dim)
            self._counts = np.ones(problem.dim, dtype=np.int64)
        else:
            kinds = np.array([dimension.kind for dimension in dimensions])
            self._counts = np.array([max(len(d.choices), 1) for d in dimensions])
        self._real = kinds == "real"
        self._named = kinds == "categorical"
        self._free = (self._width > 0) & (self._real | (self._counts > 1))
        self.start = self.canonical(problem.start)
        self.size = int(np.clip(NUMBERS // problem.dim, 30, CANDIDATES))

    def canonical(self, points: Array) -> Array:
        """The same merges without what does not matter, ``(..., dim)``."""
        return (
            np.asarray(points) if self._space is None else np.asarray(self._space.canonical(points))
        )

    def features(self, points: Array) -> Array:
        """Columns for the forest ``(n, columns)``, from points ``(n, dim)``.

        Coordinates are scaled by the box; a categorical one has a column for each of its names.
        """
        scaled = (points - self._lower) / np.where(self._width > 0, self._width, 1.0)
        columns = [scaled[:, ~self._named]]
        for index in np.flatnonzero(self._named):
            columns.append(np.floor(points[:, [index]]) == np.arange(self._counts[index]))
        return np.column_stack(columns)

    def around(self, parents: Array, count: int) -> Array:
        """Neighbours of ``parents``, and as many points from all over the box, ``(count, dim)``."""
        far = count // 2
        return np.concatenate([self.neighbours(parents, count - far), self.scattered(far)])

    def scattered(self, count: int) -> Array:
        """Points with real coordinates around the start and random choices, ``(count, dim)``."""
        points = np.tile(self.start, (count, 1))
        return self._redrawn(points, np.broadcast_to(self._free, points.shape), self.start)

    def neighbours(self, parents: Array, count: int) -> Array:
        """Parents with at least one active coordinate changed, ``(count, dim)``."""
        before = parents[self._rng.integers(len(parents), size=count)]
        active = self._active(before) & self._free
        moved = self._chosen(active)
        sigma = np.exp(self._rng.uniform(math.log(0.02), math.log(0.3), (count, 1)))
        stepped = before + sigma * self._width * self._rng.standard_normal(before.shape)
        after = np.where(moved & self._real, stepped, before)
        after = np.where(moved & ~self._real, self._other_choices(before), after)
        # Clipped, not reflected: the faces (an expert left out, the end of an arc) are merges of
        # their own.
        after = np.clip(after, self._lower, self._upper)
        # A method that has just been chosen gets parameters of its own.
        return self._redrawn(
            after, self._active(after) & ~self._active(before) & self._free, self._middle
        )

    def _chosen(self, active: Mask) -> Mask:
        """A random selection of active coordinates, at least one in each row ``(n, dim)``.

        Their number is as likely to be 1 or 2 as to be 10 or 20.
        """
        count = np.maximum(active.sum(axis=1), 1)
        share = np.exp(self._rng.random(len(active)) * np.log(count)) / count
        dice = np.where(active, self._rng.random(active.shape), 2.0)
        lowest = dice.min(axis=1, keepdims=True)
        return np.asarray(active & ((dice < share[:, None]) | (dice == lowest)))

    def _other_choices(self, before: Array) -> Array:
        """Another name, or the next number up or down, in the middle of its bin ``(n, dim)``."""
        codes = np.floor(before)
        dice = self._rng.random(before.shape)
        named = (codes + 1 + np.floor(dice * (self._counts - 1))) % self._counts
        stepped = np.where(
            codes == 0,
            1,
            np.where((codes == self._counts - 1) | (dice < 0.5), codes - 1, codes + 1),
        )
        return np.where(self._named, named, stepped) + 0.5

    def _redrawn(self, points: Array, where: Mask, centre: Point) -> Array:
        """Canonical points with new values where marked, ``(n, dim)``.

        Real coordinates are normal around ``centre``; choices are random.
        """
        near = centre + 0.25 * self._width * self._rng.standard_normal(points.shape)
        choice = np.floor(self._rng.random(points.shape) * self._counts) + 0.5
        drawn = np.where(self._real, reflect(near, self._lower, self._upper), choice)
        return self.canonical(np.where(where, drawn, points))

    def _active(self, points: Array) -> Mask:
        if self._space is None:
            return np.ones(points.shape, bool)
        return np.asarray(self._space.active(points))

    @property
    def _middle(self) -> Point:
        return (self._lower + self._upper) / 2


def identity_of(point: Point) -> bytes:
    """Short identity of a canonical point."""
    return hashlib.blake2b(np.ascontiguousarray(point).tobytes(), digest_size=16).digest()
