"""Ridge regression of quadratics, with leave-one-out residuals in closed form.

The surrogate of MAP (Li 2024, arXiv 2406.07529) without its links; see
:mod:`mergesearch.search.strategies.parts.map_surrogate`. Everything is solved in the smaller of
unknowns and points, which makes a full matrix of curvatures affordable at any dimension (Saunders
1998, "Ridge Regression Learning Algorithm in Dual Variables").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Shape = Literal["linear", "bowl", "diagonal", "free", "one-signed"]

#: Ridges that are tried, relative to the largest eigenvalue of the design.
RIDGES = 10.0 ** np.arange(-13.0, 1.0)
#: Gain of each part of A: a multiple of the identity, a diagonal, a full matrix (the first and last
#: per dimension).
GAINS: dict[Shape, tuple[float, float, float]] = {
    "linear": (0.0, 0.0, 0.0),
    "bowl": (4.0, 0.0, 0.0),
    "diagonal": (4.0, 0.2, 0.0),
    "free": (4.0, 0.2, 2.0),
}
#: Eigenvalues of the design below this share of the largest are directions without data.
RANK_TOLERANCE = 1e-14


@dataclass(frozen=True, eq=False)
class Quadratic:
    """``e + b'u + 1/2 u'Au``, with ``b`` ``(dim,)`` and ``A`` ``(dim, dim)`` symmetric."""

    e: float
    b: Array
    A: Array

    def __call__(self, offsets: Array) -> Array:
        """Values ``(n,)`` at offsets ``(n, dim)``."""
        return np.asarray(self.e + offsets @ self.b + _bend(offsets, self.A))


@dataclass(frozen=True, eq=False)
class Ridge:
    """Ridge regression of a quadratic on ``n`` weighted points, for all targets and ridges at once.

    The constant is free; the penalty on b and A is that of the kernel
    ``k(u, v) = u'v + 1/4 (bowl |u|^2 |v|^2 + axes sum_i u_i^2 v_i^2 + full (u'v)^2)``. That makes A
    the sum of a multiple of the identity, a diagonal and a symmetric matrix, each with a penalty of
    its own. Without the first, the best guess of A would be zero in all directions that no point
    lies in.

    Attributes:
        offsets: Points ``(n, dim)``.
        root: Square roots of their weights ``(n,)``; their mean square is 1.
        gains: ``bowl``, ``axes`` and ``full``.
        vectors: Eigenvectors of the kernel, centred and weighted, ``(n, rank)``.
        values: Its eigenvalues ``(rank,)``, in units of the largest.
        unit: The largest.
    """

    offsets: Array
    root: Array
    gains: Array
    vectors: Array
    values: Array
    unit: float

    @classmethod
    def of(cls, offsets: Array, shape: Shape, weights: Array | None = None) -> Ridge:
        """Decompose the design of a shape once.

        The smaller of unknowns and points decides the cost.
        """
        count, dim = offsets.shape
        weights = np.ones(count) if weights is None else weights
        root = np.sqrt(weights / weights.mean())
        gains = np.array(GAINS[shape]) / [dim, 1.0, dim]
        decompose = _by_unknowns if _unknowns(shape, dim) < count else _by_points
        vectors, values = decompose(offsets, gains, root)
        unit = float(values.max(initial=0.0)) or 1.0
        return cls(offsets, root, gains, vectors, values / unit, unit)

    def residuals(self, targets: Array, ridges: Array) -> Array:
        """Leave-one-out residuals for each ridge, in closed form.

        Args:
            targets: ``(targets, n)``.
            ridges: ``(ridges,)``.

        Returns:
            ``(targets, ridges, n)``.

        ``r_i / (1 - h_ii)`` with the hat matrix h; both are sums over what the ridge takes away, so
        that their ratio is exact even where the fit goes through every point.
        """
        centred = self._centred(targets)
        inside = centred @ self.vectors
        taken = ridges[:, None] / (self.values + ridges[:, None])
        outside = _clean(centred - inside @ self.vectors.T, np.abs(centred).max(initial=0.0))
        spare = _clean(1.0 - self.root**2 / len(self.root) - np.sum(self.vectors**2, axis=1), 1.0)
        residual = (inside[:, None, :] * taken) @ self.vectors.T + outside[:, None, :]
        leverage = taken @ (self.vectors**2).T + spare
        return np.asarray(residual / np.maximum(leverage, 1e-100) / self.root)

    def weights(self, target: Array, ridge: float) -> Array:
        """How much each point contributes to b and A, ``(n,)``."""
        inside = self._centred(target) @ self.vectors
        return np.asarray(self.root * (self.vectors @ (inside / (self.values + ridge))) / self.unit)

    def quadratic(self, target: Array, ridge: float) -> Quadratic:
        """The fit to a target ``(n,)``."""
        weights = self.weights(target, ridge)
        bare = Quadratic(0.0, weights @ self.offsets, self.curvature(weights))
        return replace(bare, e=float(self.root**2 @ (target - bare(self.offsets))) / len(target))

    def curvature(self, weights: Array) -> Array:
        """The matrix A ``(..., dim, dim)`` for weights of the points ``(..., n)``."""
        bowl, axes, full = 0.5 * self.gains
        squares = weights @ self.offsets**2
        A = (bowl * squares.sum(-1, keepdims=True) + axes * squares)[..., None] * np.eye(
            self.offsets.shape[1]
        )
        if full:
            A = A + full * np.swapaxes(self.offsets * weights[..., None], -1, -2) @ self.offsets
        return np.asarray(A)

    def inverse_columns(self, rows: npt.NDArray[np.intp], ridge: float) -> Array:
        """Changes of :meth:`weights` for a unit of left-out residual at some rows ``(rows, n)``."""
        columns = (self.vectors[rows] / (self.values + ridge)) @ self.vectors.T / self.unit
        return np.asarray(self.root[rows, None] * columns * self.root)

    def _centred(self, targets: Array) -> Array:
        mean = targets @ self.root**2 / len(self.root)
        return np.asarray((targets - mean[..., None]) * self.root)


def _by_unknowns(offsets: Array, gains: Array, root: Array) -> tuple[Array, Array]:
    """Eigenvectors and eigenvalues of the kernel, from inner products of the features."""
    features = _features(offsets, gains)
    features = (features - root**2 @ features / len(root)) * root[:, None]
    values, sides = np.linalg.eigh(features.T @ features)
    kept = values > RANK_TOLERANCE * values[-1]
    return features @ sides[:, kept] / np.sqrt(values[kept]), values[kept]


def _by_points(offsets: Array, gains: Array, root: Array) -> tuple[Array, Array]:
    """Eigenvectors and eigenvalues of the kernel itself."""
    kernel = _kernel(offsets, gains)
    mean = kernel @ root**2 / len(root)
    kernel += float(mean @ root**2) / len(root) - mean - mean[:, None]
    values, vectors = np.linalg.eigh(kernel * np.outer(root, root))
    kept = values > RANK_TOLERANCE * values[-1]
    return vectors[:, kept], values[kept]


def _clean(part: Array, unit: float) -> Array:
    """A part whose rounding errors are set to exactly zero."""
    return np.where(np.abs(part) < 1e-11 * unit, 0.0, part)


def _kernel(offsets: Array, gains: Array) -> Array:
    linear = offsets @ offsets.T
    squares = offsets**2
    length = squares.sum(axis=1)
    bowl, axes, full = 0.25 * gains
    return np.asarray(
        linear + bowl * np.outer(length, length) + axes * squares @ squares.T + full * linear**2
    )


def _unknowns(shape: Shape, dim: int) -> int:
    counts = {"linear": dim, "bowl": dim + 1, "diagonal": 2 * dim + 1}
    return counts.get(shape, dim + 1 + dim * (dim + 1) // 2)


def _features(offsets: Array, gains: Array) -> Array:
    """Features ``(n, unknowns)`` whose inner products are the kernel."""
    bowl, axes, full = gains
    squares = 0.5 * offsets**2
    parts = [offsets]
    if bowl:
        parts.append(math.sqrt(bowl) * squares.sum(axis=1, keepdims=True))
    if axes:
        parts.append(math.sqrt(axes + full) * squares)
    if full:
        rows, columns = np.triu_indices(offsets.shape[1], 1)
        parts.append(math.sqrt(0.5 * full) * offsets[:, rows] * offsets[:, columns])
    return np.hstack(parts)


def _bend(offsets: Array, A: Array) -> Array:
    """``1/2 u'Au`` ``(..., n)`` at offsets ``(n, dim)`` for matrices ``(..., dim, dim)``."""
    return np.asarray(0.5 * np.sum((offsets @ A) * offsets, axis=-1))


# --- one sign
# ----------------------------------------------------------------------------


def without_negative(A: Array) -> Array:
    """The nearest positive semidefinite matrices to symmetric ``(..., dim, dim)``."""
    values, vectors = np.linalg.eigh(A)
    return np.asarray(
        (vectors * np.maximum(values, 0.0)[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    )


@dataclass(frozen=True, eq=False)
class OneSigned:
    """A free fit whose A loses its negative eigenvalues, after which e and b are fitted again.

    Attributes:
        free, linear: The designs of the two fits, with equal weights.
    """

    free: Ridge
    linear: Ridge

    def quadratic(self, target: Array, ridge: float) -> Quadratic:
        """The fit to a target ``(n,)``."""
        A = without_negative(self.free.curvature(self.free.weights(target, ridge)))
        rest = target - _bend(self.free.offsets, A)
        fit = self.linear.quadratic(rest, self._linear_ridge(rest))
        return Quadratic(fit.e, fit.b, A)

    def residuals(self, target: Array, ridge: float, rows: npt.NDArray[np.intp]) -> Array:
        """Leave-one-out residuals of a target ``(n,)`` at some rows ``(rows,)``.

        Each left-out point has a projection of its own.

        Leaving a point out moves the weights of the free fit along a column of its inverse, by the
        point's residual. What the projected A leaves is fitted linearly, with a hat matrix again.
        """
        A = self.free.curvature(self.free.weights(target, ridge))
        left = self.free.residuals(target[None], np.array([ridge]))[0, 0, rows]
        moved = self.free.curvature(left[:, None] * self.free.inverse_columns(rows, ridge))
        rests = target - _bend(self.free.offsets, without_negative(A - moved))
        linear = self._linear_ridge(target - _bend(self.free.offsets, without_negative(A)))
        return np.asarray(
            self.linear.residuals(rests, np.array([linear]))[np.arange(len(rows)), 0, rows]
        )

    def _linear_ridge(self, rest: Array) -> float:
        errors = np.mean(self.linear.residuals(rest[None], RIDGES)[0] ** 2, axis=1)
        return float(RIDGES[int(np.argmin(errors))])
