"""What the members of a front would score on other items, estimated from all trials.

A front holds what was lucky: each member was chosen for the very scores that the front claims. The
posterior mean of a Gaussian process over all trials, with the known standard errors as noise, pulls
each member towards the trials around it by as much as its own score is uncertain (empirical Bayes;
Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", eqs. 2.25 and 2.30). On
fixed items, trials share a part of their errors, which no other trial reveals: the estimate is then
still too good, though by less than the observed scores.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]

#: Fewest trials that are a neighbourhood, and most that are used, those nearest to the members.
LEAST = 10
MOST = 500
#: Length scales in units of the median distance, and signal variances in units of the losses'
#: variance, among which the likelihood chooses.
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
SIGNALS = tuple(4.0**power for power in range(-3, 6))
#: Added to the noise, as a share of the losses' variance: factors of a smooth covariance are not
#: zero.
JITTER = 1e-9


def estimated_around(
    points: Array, losses: Array, errors: Array, members: Rows
) -> tuple[Rows, Array] | None:
    """Estimated losses of the members and of the trials nearest to them.

    Args:
        points: Positions of the trials ``(trials, dim)``; coordinates count by their ranges.
        losses: As observed ``(trials, objectives)``.
        errors: Their standard errors ``(trials, objectives)``.
        members: Rows of the members.

    Returns:
        Rows of the trials in ascending order, the members among them, and their losses
        ``(rows, objectives)``; None where there are too few trials, or errors are not known.
    """
    ranges = np.ptp(points, axis=0)
    points = points[:, ranges > 0] / ranges[ranges > 0]
    if not points.size:
        return None
    distances = _distances(points, points[members])
    # Nearness decides, never losses: leaving out bad luck would make the rest look good.
    order = np.argsort(distances.min(axis=1), kind="stable")[: max(MOST, len(members))]
    kept = np.union1d(order, members)
    usable = np.isfinite(losses[kept]).all() and np.isfinite(errors[kept]).all()
    if len(kept) < LEAST or not usable:
        return None
    noises = np.mean(errors[kept] ** 2, axis=0)
    return kept, _smoothed(_distances(points[kept], points[kept]), losses[kept], noises)


def _smoothed(distances: Array, losses: Array, noises: Array) -> Array:
    """Posterior means at the points themselves ``(trials, objectives)``.

    Args:
        distances: Between the points ``(trials, trials)``.
        losses: As observed ``(trials, objectives)``.
        noises: Variance of one observed loss ``(objectives,)``.
    """
    unit = float(np.median(distances[distances > 0]))
    best = [(-np.inf, values) for values in losses.T]
    for length in LENGTHS:
        correlations = np.exp(-0.5 * (distances / (length * unit)) ** 2)
        roots, vectors = np.linalg.eigh(correlations)
        roots = np.maximum(roots, 0.0)
        for m, values in enumerate(losses.T):
            if np.ptp(values) > 0.0:
                fits = _fits(roots, vectors, values, float(noises[m]))
                best[m] = max([best[m], *fits], key=lambda fit: fit[0])
    return np.stack([values for _, values in best], axis=1)


def _fits(roots: Array, vectors: Array, values: Array, noise: float) -> list[tuple[float, Array]]:
    """Log likelihood and posterior means ``(trials,)`` of one objective, for each signal."""
    spread = float(np.var(values))
    ones = vectors.T @ np.ones(len(values))
    turned = vectors.T @ values
    fits = []
    for signal in SIGNALS:
        variances = signal * spread * roots + noise + JITTER * spread
        mean = np.sum(ones * turned / variances) / np.sum(ones**2 / variances)
        rest = turned - mean * ones
        likelihood = -0.5 * float(np.sum(rest**2 / variances + np.log(variances)))
        shares = signal * spread * roots / variances
        fits.append((likelihood, mean + vectors @ (shares * rest)))
    return fits


def _distances(here: Array, there: Array) -> Array:
    """Euclidean distances ``(here, there)``."""
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(here, there))
