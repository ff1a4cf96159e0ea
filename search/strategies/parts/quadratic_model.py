"""A regularised quadratic through scattered, noisy, weighted results.

Ridge regression on constant, slopes and all products of coordinates, in its dual form: n results
cost ``n^3``, whatever the number of products, and with fewer results than products the curvature
has the smallest norm that explains them (Powell 2006, "The NEWUOA software for unconstrained
optimization without derivatives", with least Frobenius norm). The same is a Gaussian process,
whence the evidence that chooses the ridge and the standard deviation (Rasmussen and Williams 2006,
"Gaussian Processes for Machine Learning", eq. 2.23-2.26, 2.30, 5.9 and 5.12). A curvature that is
equal in all directions is hardly penalised at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: Ridges that the evidence chooses from, in units of the mean eigenvalue of the kernel.
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
        evidence: Log evidence, less that of the weighted mean alone; above 0: it predicts.
        noise: Weighted root mean square of the residuals.
        points, weights: Results that it was fitted to, ``(n, dim)`` and ``(n,)``.
        scale: How much the loss was expected to vary along each coordinate ``(dim,)``.
        dual: α = (K + ridge)^-1 y of the weighted, standardised losses y ``(n,)``.
        fit: y'α.
        whitener: ``(n, n)``: eigenvectors of the kernel over the square roots of its eigenvalues
            plus ridge.
        ridge: The ridge chosen.
    """

    value: float
    slope: Array
    curvature: Array
    residuals: Array
    evidence: float
    noise: float
    points: Array
    weights: Array
    scale: Array
    dual: Array
    fit: float
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
        here = point[None]
        cross = np.sqrt(self.weights) * kernel(self.points, here, self.scale)[:, 0]
        own = kernel(here, here, self.scale)[0, 0]
        variance = own - np.sum((self.whitener.T @ cross) ** 2)
        return float(self.noise * np.sqrt(max(variance, 0.0) / self.ridge))

    def unknown(self, points: Array, pending: Array) -> Array:
        """Variances of the predictions once other results are in, relative to each other ``(n,)``.

        A variance does not depend on the losses, so it is known beforehand.

        Args:
            points: ``(n, dim)``.
            pending: Where results are outstanding ``(m, dim)``; each will count like one of
                weight 1.
        """
        both = np.concatenate([pending, points])
        cross = np.sqrt(self.weights)[:, None] * kernel(self.points, both, self.scale)
        spanned = self.whitener.T @ cross
        covariance = kernel(both, both, self.scale) - spanned.T @ spanned
        count = len(pending)
        noisy = covariance[:count, :count] + self.ridge * np.eye(count)
        shared = covariance[:count, count:]
        told = np.sum(shared * np.linalg.solve(noisy, shared), axis=0)
        return np.asarray(np.diag(covariance)[count:] - told)

    def scale_gradient(self) -> Array:
        """Derivative of the log evidence by the logarithm of each coordinate's scale ``(dim,)``."""
        # ∂L/∂θ = ½ tr((n α α' / y'α − (K + ridge)^-1) ∂K/∂θ) (Rasmussen and Williams 2006, eq.
        # 5.9, with the unit of the losses profiled out)
        root = np.sqrt(self.weights)
        inner = len(root) * np.outer(self.dual, self.dual) / self.fit
        inner -= self.whitener @ self.whitener.T
        inner *= np.outer(root, root)
        # ∂k/∂θ_i = (2 s_i² + 2 s_i x'Sy / d) x_i y_i / d + COMMON s_i (x_i² |y|² + y_i² |x|²) / d²
        dim = self.points.shape[1]
        bent = inner * ((self.points * self.scale) @ self.points.T / dim)
        slopes = np.sum(self.points * (inner @ self.points), axis=0)
        products = np.sum(self.points * (bent @ self.points), axis=0)
        common = (inner @ _size(self.points, self.scale)) @ self.points**2
        return np.asarray(
            (self.scale**2 * slopes + self.scale * (products + COMMON * common)) / dim
        )


def kernel(left: Array, right: Array, scale: Array | float = 1.0) -> Array:
    """Covariance ``(n, m)`` of a random quadratic at points ``(n, dim)`` and ``(m, dim)``.

    k(x, y) = CONSTANT + x'S²y / d + (x'Sy / d)² + COMMON · x'Sx · y'Sy / d², S = diag(scale).

    Slopes vary with the scale of their coordinate, and so do curvatures, so that the distance of
    the minimum does not depend on it.
    """
    dim = left.shape[1]
    slopes = (left * scale**2) @ right.T / dim
    products = (left * scale) @ right.T / dim
    return np.asarray(
        CONSTANT + slopes + products**2 + COMMON * np.outer(_size(left, scale), _size(right, scale))
    )


def _size(points: Array, scale: Array | float) -> Array:
    return np.asarray(np.mean(points**2 * scale, axis=1))


def fit_quadratic(
    points: Array, losses: Array, weights: Array, scale: Array | None = None
) -> QuadraticModel | None:
    """The quadratic whose ridge has the most evidence.

    None if the losses do not differ.

    Args:
        points: ``(n, dim)``, in coordinates of about unit size.
        losses: ``(n,)``.
        weights: ``(n,)``, positive: inverse variance of a loss up to a factor.
        scale: How much the loss is expected to vary along each coordinate, relative to the others
            ``(dim,)``; None: equally.
    """
    share = weights / np.sum(weights)
    mean = float(share @ losses)
    spread = float(np.sqrt(share @ (losses - mean) ** 2))
    if not spread > 1e-12 * (1.0 + abs(mean)):
        return None
    dim = points.shape[1]
    scale = np.ones(dim) if scale is None else scale
    root = np.sqrt(weights)
    target = root * (losses - mean) / spread
    eigenvalues, vectors = np.linalg.eigh(kernel(points, points, scale) * np.outer(root, root))
    eigenvalues = np.maximum(eigenvalues, 0.0)
    rotated = vectors.T @ target
    ridge, evidence = _choose_ridge(eigenvalues, rotated)
    dual = vectors @ (rotated / (eigenvalues + ridge))
    # Rasmussen and Williams 2006, eq. 5.12
    residuals = dual / (vectors**2 @ (1.0 / (eigenvalues + ridge)))
    alpha = spread * root * dual
    bent = points * scale
    curvature = 2 * (bent.T * alpha) @ bent / dim**2
    curvature += 2 * COMMON * float(_size(points, scale) @ alpha) / dim * np.diag(scale)
    return QuadraticModel(
        value=mean + CONSTANT * float(np.sum(alpha)),
        slope=scale**2 * (points.T @ alpha) / dim,
        curvature=curvature,
        residuals=spread * residuals / root,
        evidence=evidence,
        noise=spread * float(np.sqrt(np.sum(residuals**2) / np.sum(weights))),
        points=points,
        weights=weights,
        scale=scale,
        dual=dual,
        fit=float(target @ dual),
        whitener=vectors / np.sqrt(eigenvalues + ridge),
        ridge=ridge,
    )


def _choose_ridge(eigenvalues: Array, rotated: Array) -> tuple[float, float]:
    """The ridge with the most evidence, and its log evidence over that of the mean alone.

    L = −½ n log(y' (K + ridge)^-1 y / n) − ½ log |K + ridge| (Rasmussen and Williams 2006, eq.
    2.30, with the unit of the losses profiled out); the mean alone is K = 0.

    Args:
        eigenvalues: Of the kernel ``(n,)``.
        rotated: Losses along its eigenvectors ``(n,)``.
    """
    count = len(rotated)
    ridges = RIDGES * np.mean(eigenvalues)
    shifted = eigenvalues + ridges[:, None]
    evidence = -0.5 * count * np.log(np.sum(rotated**2 / shifted, axis=1) / count)
    evidence -= 0.5 * np.sum(np.log(shifted), axis=1)
    best = int(np.argmax(evidence))
    alone = -0.5 * count * np.log(np.sum(rotated**2) / count)
    return float(ridges[best]), float(evidence[best] - alone)


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
