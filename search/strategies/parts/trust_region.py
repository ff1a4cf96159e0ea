"""A trust region around a point of the unit cube, and the quadratic model in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergesearch.search.strategies.base import Point
from mergesearch.search.strategies.parts.quadratic_model import Array, QuadraticModel, descend

#: Losses so many times as far above the best tenth as the median is count half.
TALL = 2.0
#: The model is sure of its minimum if its standard deviation there is at most so many times the
#: noise,
SURE = 2.0
#: or at most this share of what it gains over the centre.
GAIN = 0.25
#: The part of the region that the model is sure of is not made smaller than this.
LEAST_REACH = 0.02
#: Draws of which the least known is taken while many results are outstanding.
DRAWS = 8


@dataclass(frozen=True, eq=False)
class Region:
    """A trust region, a box in the unit cube, and the model in it.

    The model's coordinates are ``(unit - centre) / half``.

    Attributes:
        centre: Unit cube ``(dim,)``.
        half: Half-width.
        model: Fitted in the region.
        lower, upper: The part that the model is sure of, in its coordinates ``(dim,)``.
        minimum: The model's, in that part ``(dim,)``.
        axes: Directions of the curvature, in columns ``(dim, dim)``.
        bends: Curvature along each of them ``(dim,)``.
    """

    centre: Point
    half: float
    model: QuadraticModel
    lower: Array
    upper: Array
    minimum: Array
    axes: Array
    bends: Array

    def draw(self, rng: np.random.Generator) -> Point:
        """A point of the unit cube around the minimum ``(dim,)``."""
        rise = rng.random() * self.model.noise
        limit = 0.25 * float(np.max(self.upper - self.lower))
        spread = np.minimum(np.sqrt(2 * rise / np.maximum(self.bends, 1e-12)), limit)
        point = self.minimum + self.axes @ (spread * rng.standard_normal(spread.size))
        return self.to_unit(np.clip(point, self.lower, self.upper))

    def draw_apart(self, rng: np.random.Generator, pending: Array) -> Point:
        """The one of some draws whose loss will be least known ``(dim,)``.

        Args:
            rng: For the draws.
            pending: Points of the unit cube whose results are outstanding ``(n, dim)``.
        """
        draws = np.array([self.draw(rng) for _ in range(DRAWS)])
        unknown = self.model.unknown(self._offsets(draws), self._offsets(pending))
        return np.asarray(draws[np.argmax(unknown)])

    def predict(self, units: Array) -> Array:
        """Losses ``(...)`` at points of the unit cube ``(..., dim)``."""
        return self.model.predict(self._offsets(units))

    def _offsets(self, units: Array) -> Array:
        """Unit cube -> coordinates of the model."""
        return np.asarray((units - self.centre) / self.half)

    def to_unit(self, point: Array) -> Point:
        """Coordinates of the model -> unit cube."""
        return np.clip(self.centre + self.half * point, 0.0, 1.0)


def make_region(centre: Point, half: float, model: QuadraticModel) -> Region:
    """The part of the box around ``centre`` in which the model is sure of its minimum."""
    bends, axes = np.linalg.eigh(model.curvature)
    step = 1.0 / max(float(np.max(np.abs(bends))), 1e-12)
    reach = 1.0
    while True:
        lower = np.maximum(-reach, -centre / half)
        upper = np.minimum(reach, (1.0 - centre) / half)
        minimum = descend(model.slope, model.curvature, step, lower, upper)
        gain = model.value - float(model.predict(minimum))
        if reach < LEAST_REACH or model.deviation(minimum) < max(SURE * model.noise, GAIN * gain):
            return Region(centre, half, model, lower, upper, minimum, axes, bends)
        reach *= 0.7


def low_ones(losses: Array) -> Array:
    """Weight of each loss ``(n,)``: about 1 near the best tenth, small far above the median."""
    low, middle = np.quantile(losses, [0.1, 0.5])
    scale = TALL * (middle - low) or float(np.std(losses)) or 1.0
    return np.asarray(1.0 / (1.0 + (np.maximum(losses - low, 0.0) / scale) ** 2))


def certain_ones(squares: Array) -> Array:
    """Weight of each result by its squared standard error ``(n,)``, which is NaN where unknown.

    Inverse variances, 1 for the most certain tenth; results whose error is not known count as
    these.
    """
    known = np.isfinite(squares)
    least = float(np.quantile(squares[known], 0.1)) if known.any() else 0.0
    if not least > 0.0:
        return np.ones(len(squares))
    weights = least / np.maximum(np.where(known, squares, least), least)
    # Errors that differ by rounding are equal.
    return np.where(weights > 1.0 - 1e-6, 1.0, weights)
