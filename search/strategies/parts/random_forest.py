"""A random forest of the losses of configurations, and the results that it is fitted to.

One forest predicts all objectives on any number of items, the logarithm of their share being a
feature (Hutter 2011, "Sequential model-based optimization for general algorithm configuration").
Candidates are ranked by expected improvement of a random weighting (Knowles 2006, "ParEGO").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.search.strategies.base import Point

Array = npt.NDArray[np.float64]

#: Weight ρ of the sum in the augmented Tchebycheff function (Knowles 2006, section II).
RHO = 0.05
#: Features that a split chooses from, and results that a tree sees, at most.
FEATURES = 100
SAMPLES = 1000


def simplex_weights(objectives: int, rng: np.random.Generator) -> Array:
    """Weights ``(objectives,)``, uniform over those that sum to 1."""
    return np.ones(1) if objectives == 1 else rng.dirichlet(np.ones(objectives))


def augmented_tchebycheff(losses: Array, weights: Array) -> Array:
    """max_i λ_i f_i + ρ Σ_i λ_i f_i (Knowles 2006, eq. 2), ``(..., objectives)`` to ``(...)``."""
    weighted = losses * weights
    return np.asarray(weighted.max(axis=-1) + RHO * weighted.sum(axis=-1))


class Results:
    """Results of all trials, with losses scaled by their range.

    Attributes:
        points: Canonical points.
        members: Numbers of the results on each rung, failures included.
        successes: Number of results that have losses.
    """

    def __init__(self, objectives: int, rungs: int) -> None:
        self.points: list[Point] = []
        self.members: list[list[int]] = [[] for _ in range(rungs)]
        self.successes = 0
        self._objectives = objectives
        self._losses: list[Array] = []
        self._shares: list[float] = []
        self._scaled: Array | None = None

    def add(self, point: Point, losses: Array | None, share: float, rung: int) -> None:
        """Add a result on a share of the items; ``rung`` is -1 where it belongs to no rung."""
        if rung >= 0:
            self.members[rung].append(len(self.points))
        self.points.append(point)
        self._losses.append(np.full(self._objectives, np.nan) if losses is None else losses)
        self._shares.append(share)
        self.successes += losses is not None
        self._scaled = None

    @property
    def scaled(self) -> Array:
        """Losses between 0 and 1, NaN for failures, ``(results, objectives)``."""
        if self._scaled is None:
            losses = np.array(self._losses).reshape(-1, self._objectives)
            self._scaled = scale_losses(losses) if self.successes else losses
        return self._scaled

    def scores(self, members: Sequence[int], weights: Array) -> Array:
        """One number to minimise for each result; infinite for failures."""
        scores = augmented_tchebycheff(self.scaled[members], weights)
        return np.where(np.isnan(scores), np.inf, scores)

    def best(self, weights: Array) -> float:
        """The lowest score on the highest rung that has one."""
        lowest = (
            self.scores(members, weights).min(initial=np.inf) for members in reversed(self.members)
        )
        return next((float(score) for score in lowest if score < np.inf), 1.0)

    def training(self) -> tuple[Array, Array, Array]:
        """What the forest is fitted to: the successes.

        Returns:
            Points ``(n, dim)``, log shares of the items ``(n,)`` and scaled losses
            ``(n, objectives)``.
        """
        kept = np.flatnonzero(~np.isnan(self.scaled[:, 0]))
        points = np.array([self.points[index] for index in kept])
        shares = np.log([self._shares[index] for index in kept])
        return points, shares, self.scaled[kept]


def scale_losses(losses: Array) -> Array:
    """Losses ``(n, objectives)`` from their lowest, 0, to their highest, 1; NaN stays NaN.

    What lies more than three interquartile ranges above the third quartile counts as being there
    (Tukey 1977).
    """
    low, first, third, high = np.nanquantile(losses, [0.0, 0.25, 0.75, 1.0], axis=0)
    high = np.minimum(high, third + 3 * (third - first))
    return np.asarray(np.minimum((losses - low) / np.where(high > low, high - low, 1.0), 1.0))


@dataclass(frozen=True)
class Forest:
    """Regression trees on coordinates and the number of items, for all objectives at once.

    Attributes:
        trees: Fitted trees.
        features: Points ``(n, dim)`` -> columns for the trees.
        results: Number of results that it was fitted to.
        fidelity: Whether the last column is the logarithm of the share of items.
    """

    trees: Sequence[Any]
    features: Callable[[Array], Array]
    results: int
    fidelity: bool

    @classmethod
    def fit(
        cls, results: Results, features: Callable[[Array], Array], trees: int, seed: int
    ) -> Forest:
        """A forest fitted to all successes."""
        from sklearn.ensemble import ExtraTreesRegressor

        points, shares, losses = results.training()
        columns = features(points)
        fidelity = bool(np.any(shares < 0))
        if fidelity:
            columns = np.column_stack([columns, shares])
        # Splits at random values, as in SMAC's forest: smoother, and cheaper, than the best ones.
        model = ExtraTreesRegressor(
            trees,
            bootstrap=True,
            max_features=min(max(round(columns.shape[1] * 5 / 6), 1), FEATURES),
            max_samples=min(len(columns), SAMPLES),
            random_state=seed,
            n_jobs=1,
        )
        model.fit(columns, losses if losses.shape[1] > 1 else losses[:, 0])
        return cls(model.estimators_, features, results.successes, fidelity)

    def predict(self, points: Array) -> Array:
        """Losses on all items by every tree, ``(trees, n, objectives)``."""
        columns = self.features(points)
        if self.fidelity:
            columns = np.column_stack([columns, np.zeros(len(columns))])
        narrow = columns.astype(np.float32)
        return np.array(
            [
                tree.predict(narrow, check_input=False).reshape(len(points), -1)
                for tree in self.trees
            ]
        )

    def ranking(self, points: Array, weights: Array, best: float) -> npt.NDArray[np.intp]:
        """Indices of the points by falling expected improvement, then by rising mean."""
        scores = augmented_tchebycheff(self.predict(points), weights)
        mean = scores.mean(axis=0)
        deviation = scores.std(axis=0)
        return np.lexsort((mean, -expected_improvement(mean, deviation, best)))


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """E max(best − x, 0) of normal x (Jones 1998, "Efficient global optimization", eq. 15)."""
    from scipy.special import ndtr

    safe = np.maximum(deviation, 1e-12)
    # EI = σ (z Φ(z) + φ(z)) with z = (best − μ) / σ
    z = (best - mean) / safe
    return np.asarray(safe * (z * ndtr(z) + np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)))
