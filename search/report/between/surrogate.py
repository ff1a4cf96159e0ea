"""Quadratics through the trials around a front, and whether they predict anything.

Each objective has the quadratic of :mod:`mergesearch.search.strategies.parts.quadratic_model`,
fitted to all trials or to those nearest to the front, whichever predicts left-out trials near the
front best. It predicts nothing where these errors are hardly below the spread of the losses there:
then the mean would do as well (Stone 1974, "Cross-validatory choice and assessment of statistical
predictions").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.search.strategies.parts.quadratic_model import (
    QuadraticModel,
    descend,
    fit_quadratic,
)

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]

#: Fewest trials that quadratics are fitted to, and most, those nearest to the front.
LEAST = 20
MOST = 400
#: Shares of these trials that fits are tried with; errors are compared on the last share.
SHARES = (1.0, 0.5, 0.25)
#: Most coordinates: curvatures are matrices of them.
MOST_COORDINATES = 128
#: A surrogate that explains less of the variance of left-out losses is useless.
LEAST_EXPLAINED = 0.1


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Quadratics of all objectives, and the box between the members of the front.

    Attributes:
        centre, half: Coordinates of the models are ``(point - centre) / half``, both ``(dim,)``.
        varies: Coordinates that differ between trials ``(dim,)``; the others stay at the centre.
        models: One for each objective; None for one that does not differ.
        errors: Root mean square of the losses of left-out trials less their predictions, near the
            front ``(objectives,)``.
        spreads: Standard deviations of the losses there ``(objectives,)``.
        lower, upper: The box, in coordinates of the models ``(varying,)``.
    """

    centre: Array
    half: Array
    varies: npt.NDArray[np.bool_]
    models: tuple[QuadraticModel | None, ...]
    errors: Array
    spreads: Array
    lower: Array
    upper: Array

    @property
    def explained(self) -> Array:
        """Share of the variance of left-out losses that is predicted ``(objectives,)``."""
        variances = np.where(self.spreads > 0, self.spreads, 1.0) ** 2
        return np.where(self.spreads > 0, 1.0 - self.errors**2 / variances, 0.0)

    def coordinates(self, point: Array) -> Array:
        """A point of the space ``(dim,)`` in coordinates of the models ``(varying,)``."""
        return np.asarray(((point - self.centre) / self.half)[self.varies])

    def point(self, offsets: Array) -> Array:
        """Inverse of :meth:`coordinates`."""
        point = self.centre.copy()
        point[self.varies] += self.half[self.varies] * offsets
        return point

    def predict(self, point: Array) -> tuple[Array, Array]:
        """Expected losses of a point ``(dim,)``, and how far a measurement may lie from them.

        Both are ``(objectives,)``. The error joins that of the model there and that at left-out
        trials.
        """
        here = self.coordinates(point)
        known = [model for model in self.models if model is not None]
        assert len(known) == len(self.models)
        losses = np.array([float(model.predict(here)) for model in known])
        deviations = np.array([model.deviation(here) for model in known])
        return losses, np.hypot(deviations, self.errors)

    def best(self, weights: Array, start: Array) -> Array:
        """The point ``(dim,)`` of the box with the least expected ``weights @ losses``.

        Args:
            weights: Of the losses ``(objectives,)``.
            start: Where to begin ``(dim,)``.
        """
        here = self.coordinates(start)
        slope = np.zeros_like(here)
        curvature = np.zeros((len(here), len(here)))
        for weight, model in zip(weights, self.models, strict=True):
            if model is not None:
                slope += weight * (model.slope + model.curvature @ here)
                curvature += weight * model.curvature
        bends = np.abs(np.linalg.eigvalsh(curvature))
        # Steps of plain descent where there is no curvature reach the end of the box.
        step = 1.0 / max(float(bends.max()), float(np.abs(slope).max()) / 10.0, 1e-12)
        return self.point(
            here + descend(slope, curvature, step, self.lower - here, self.upper - here)
        )


def fit_around(points: Array, losses: Array, members: Rows) -> Surrogate:
    """Quadratics through the trials around the members of a front.

    Args:
        points: Positions of the trials ``(trials, dim)``, at least :data:`LEAST`.
        losses: As observed ``(trials, objectives)``, finite.
        members: Rows of the members.
    """
    half = np.ptp(points, axis=0) / 2
    varies = half > 0
    centre = points[members].mean(axis=0)
    offsets = (points - centre)[:, varies] / half[varies]
    order = np.argsort(_distances(offsets, offsets[members]), kind="stable")[:MOST]
    counts = [max(LEAST, int(share * len(order))) for share in SHARES]
    near = losses[order[: counts[-1]]]
    fits = [_fit(offsets[order], column[order], counts) for column in losses.T]
    return Surrogate(
        centre=centre,
        half=half,
        varies=varies,
        models=tuple(model for model, _ in fits),
        errors=np.array([error for _, error in fits]),
        spreads=near.std(axis=0),
        lower=offsets[members].min(axis=0),
        upper=offsets[members].max(axis=0),
    )


def _fit(offsets: Array, losses: Array, counts: list[int]) -> tuple[QuadraticModel | None, float]:
    """The model of the nearest trials with the least error at the last count, and that error."""
    best: tuple[QuadraticModel | None, float] = (None, float(np.std(losses[: counts[-1]])))
    found = False
    for count in dict.fromkeys(counts):
        model = fit_quadratic(offsets[:count], losses[:count], np.ones(count))
        if model is None:
            continue
        error = float(np.sqrt(np.mean(model.residuals[: counts[-1]] ** 2)))
        if not found or error < best[1]:
            best = (model, error)
            found = True
    return best


def _distances(points: Array, members: Array) -> Array:
    """Distance to the nearest member ``(points,)``."""
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(points, members).min(axis=1))
