"""A regularised quadratic through scattered, noisy, weighted results.

Ridge regression on constant, slopes and all products of coordinates, in its dual form: n results
cost ``n^3``, whatever the number of products, and with fewer results than products the curvature
has the smallest norm that explains them (Powell 2006, "The NEWUOA software for unconstrained
optimization without derivatives", with least Frobenius norm). The same is a Gaussian process,
whence the standard deviation (Rasmussen and Williams 2006, "Gaussian Processes for Machine
Learning", eq. 2.23-2.26 and 5.12). A curvature that is equal in all directions is hardly penalised
at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: Ridges that leave-one-out chooses from, in units of the mean eigenvalue of the kernel.
RIDGES = 10.0 ** np.arange(-9, 3)
#: Prior variances of the constant and of the common curvature; those of a slope and of a product
#: are 1.
CONSTANT = COMMON = 10.0
#: Iterations of the search for the minimum.
DESCENT = 100


@dataclass(frozen=True, eq=False)
class QuadraticModel:
    """``value + slope z + z' curvature z / 2``, fitted to results.

    Attributes:
        value, slope, curvature: Coefficients: a number, ``(dim,)`` and ``(dim, dim)``.
        residuals: Leave-one-out error at each result ``(n,)``.
        error: Their weighted mean square over that of predicting by the weighted mean alone; below
            1: it predicts.
        noise: Their weighted root mean square.
        points, weights: Results that it was fitted to, ``(n, dim)`` and ``(n,)``.
        whitener: ``(n, n)``: eigenvectors of the kernel over the square roots of its eigenvalues
            plus ridge.
        ridge: The ridge chosen.
    """

    value: float
    slope: Array
    curvature: Array
    residuals: Array
    error: float
    noise: float
    points: Array
    weights: Array
    whitener: Array
    ridge: float

    def predict(self, points: Array) -> Array:
        """Losses ``(...)`` at points ``(..., dim)``."""
        return np.asarray(
            self.value
            + points @ self.slope
            + 0.5 * np.sum((points @ self.curvature) * points, axis=-1)
        )

    def deviation(self, point: Array) -> float:
        """Standard deviation of the prediction at ``(dim,)``, without the noise of a result."""
        # k(x, x) − k' (K + ridge)^-1 k (Rasmussen and Williams 2006, eq. 2.26)
        cross = np.sqrt(self.weights) * kernel(self.points, point[None])[:, 0]
        variance = kernel(point[None], point[None])[0, 0] - np.sum((self.whitener.T @ cross) ** 2)
        return float(self.noise * np.sqrt(max(variance, 0.0) / self.ridge))


def kernel(left: Array, right: Array) -> Array:
    """Covariance ``(n, m)`` of a random quadratic at points ``(n, dim)`` and ``(m, dim)``.

    k(x, y) = CONSTANT + x'y / d + (x'y / d)² + COMMON · |x|² |y|² / d².
    """
    dim = left.shape[1]
    products = left @ right.T / dim
    return np.asarray(
        CONSTANT + products + products**2 + COMMON * np.outer(_size(left), _size(right))
    )


def _size(points: Array) -> Array:
    return np.asarray(np.mean(points**2, axis=1))


def fit_quadratic(points: Array, losses: Array, weights: Array) -> QuadraticModel | None:
    """The quadratic whose ridge has the least leave-one-out error.

    None if the losses do not differ.

    Args:
        points: ``(n, dim)``, in coordinates of about unit size.
        losses: ``(n,)``.
        weights: ``(n,)``, positive: inverse variance of a loss up to a factor.
    """
    share = weights / np.sum(weights)
    mean = float(share @ losses)
    spread = float(np.sqrt(share @ (losses - mean) ** 2))
    if not spread > 1e-12 * (1.0 + abs(mean)):
        return None
    scaled = (losses - mean) / spread
    root = np.sqrt(weights)
    eigenvalues, vectors = np.linalg.eigh(kernel(points, points) * np.outer(root, root))
    eigenvalues = np.maximum(eigenvalues, 0.0)
    ridge, dual, residuals = _choose_ridge(eigenvalues, vectors, root * scaled)
    # Leaving one out of a weighted mean changes it by the factor 1 / (1 - share).
    baseline = float(np.sum((root * scaled / np.maximum(1.0 - share, 1e-12)) ** 2))
    alpha = spread * root * dual
    dim = points.shape[1]
    return QuadraticModel(
        value=mean + CONSTANT * float(np.sum(alpha)),
        slope=points.T @ alpha / dim,
        curvature=2 * (points.T * alpha) @ points / dim**2
        + 2 * COMMON * float(_size(points) @ alpha) / dim * np.eye(dim),
        residuals=spread * residuals / root,
        error=float(np.sum(residuals**2)) / baseline,
        noise=spread * float(np.sqrt(np.sum(residuals**2) / np.sum(weights))),
        points=points,
        weights=weights,
        whitener=vectors / np.sqrt(eigenvalues + ridge),
        ridge=ridge,
    )


def _choose_ridge(eigenvalues: Array, vectors: Array, target: Array) -> tuple[float, Array, Array]:
    """The ridge with the least sum of squared leave-one-out residuals.

    Returns:
        Ridge, dual coefficients ``(n,)`` and leave-one-out residuals ``(n,)``.
    """
    rotated = vectors.T @ target
    squared = vectors**2
    best: tuple[float, Array, Array] | None = None
    for ridge in RIDGES * np.mean(eigenvalues):
        inverse = 1.0 / (eigenvalues + ridge)
        dual = vectors @ (inverse * rotated)
        residuals = dual / (squared @ inverse)  # Rasmussen and Williams 2006, eq. 5.12
        if best is None or np.sum(residuals**2) < np.sum(best[2] ** 2):
            best = float(ridge), dual, residuals
    assert best is not None
    return best


def descend(slope: Array, curvature: Array, step: float, lower: Array, upper: Array) -> Array:
    """Minimise ``slope z + z' curvature z / 2`` in a box from the point next to 0.

    Accelerated projected gradients: O'Donoghue and Candes 2015, "Adaptive Restart for Accelerated
    Gradient Schemes", algorithm 1 with the gradient scheme.
    """
    here = np.clip(np.zeros_like(slope), lower, upper)
    ahead = here
    momentum = 1.0
    for _ in range(DESCENT):
        there = np.clip(ahead - step * (curvature @ ahead + slope), lower, upper)
        move = there - here
        if np.max(np.abs(move), initial=0.0) < 1e-9:
            return there
        if (ahead - there) @ move > 0:
            ahead = there
            momentum = 1.0
        else:
            following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            ahead = there + (momentum - 1) / following * move
            momentum = following
        here = there
    return here
