"""The arithmetic behind the league's made problems: items whose margins are quadratics.

An item of a task is answered rightly where its margin is positive::

    margin(x) = top − |φ|² + pull · w·φ + s,    φ = F (x − centre)          (1)

``s`` is logistic noise of the item, ``w`` a standard normal direction of its own. In the mean over
all conceivable items the optimum is ``centre``; any finite set of items has an optimum of its own,
so a search can over-fit it. The accuracy over all conceivable items has a closed form up to one
Gaussian integral, so that the true loss of every point is known::

    accuracy(x) = E_g σ(top − |φ|² + pull · |φ| g),    g ~ N(0, 1)          (2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
#: Float64 ``(k, dim)``, dense or one of scipy's sparse arrays.
Matrix = Any

#: Nodes and weights of E over g ~ N(0, 1) (Gauss-Hermite).
NODES, _RAW = np.polynomial.hermite_e.hermegauss(21)
WEIGHTS = _RAW / _RAW.sum()


@dataclass(frozen=True, eq=False)
class Task:
    """What its items have in common.

    Attributes:
        matrix: F of (1) ``(k, dim)``.
        centre: Where the accuracy is largest ``(dim,)``.
        top: Margin there.
        pull: How far single items differ in what is good for them; 0: not at all.
        steps: The length of φ is rounded down to multiples of ``1 / steps``; 0: smooth.
    """

    matrix: Matrix
    centre: Array
    top: float
    pull: float = 0.0
    steps: int = 0

    def features(self, point: Array) -> Array:
        """φ at a point ``(k,)``."""
        phi = self.matrix @ (point - self.centre)
        if not self.steps:
            return np.asarray(phi)
        length = float(np.linalg.norm(phi))
        return np.asarray(phi * (np.floor(length * self.steps) / self.steps / max(length, 1e-300)))

    def accuracy(self, point: Array) -> float:
        """Share of all conceivable items that are right (2)."""
        phi = self.features(point)
        square = float(phi @ phi)
        margins = self.top - square + self.pull * np.sqrt(square) * NODES
        return float(WEIGHTS @ expit(margins))

    def slope(self, point: Array) -> Array:
        """Gradient of the accuracy ``(dim,)``, of a smooth task."""
        phi = self.features(point)
        length = max(float(np.linalg.norm(phi)), 1e-6)
        right = expit(self.top - length**2 + self.pull * length * NODES)
        # d accuracy / d|φ|², then d|φ|²/dx = 2 Fᵀφ
        inner = WEIGHTS @ (right * (1.0 - right) * (0.5 * self.pull * NODES / length - 1.0))
        return np.asarray(inner * 2.0 * (self.matrix.T @ phi))


@dataclass(frozen=True, eq=False)
class Items:
    """Items of one task.

    Attributes:
        shifts: s of (1) ``(items,)``.
        directions: Row i is ``pull · w_i F``, ``(items, dim)``; empty ``(0, dim)`` where items
            agree.
    """

    shifts: Array
    directions: Array

    @classmethod
    def draw(cls, task: Task, count: int, rng: np.random.Generator) -> Items:
        """``count`` items of a task."""
        rows, dim = task.matrix.shape
        if not task.pull:
            return cls(rng.logistic(size=count), np.empty((0, dim)))
        own = rng.standard_normal((count, rows))
        return cls(rng.logistic(size=count), task.pull * (own @ task.matrix))

    def margins(self, task: Task, point: Array) -> Array:
        """Margins at a point ``(items,)`` (1)."""
        phi = task.features(point)
        margins = task.top - phi @ phi + self.shifts
        if not len(self.directions):
            return np.asarray(margins)
        exact = task.matrix @ (point - task.centre)
        shrunk = np.linalg.norm(phi) / max(float(np.linalg.norm(exact)), 1e-300)
        return np.asarray(margins + shrunk * (self.directions @ (point - task.centre)))

    def loss_and_slope(self, task: Task, point: Array, chosen: Rows) -> tuple[float, Array]:
        """Mean cross-entropy of the chosen items, and its gradient ``(dim,)``."""
        margins = self.margins(task, point)[chosen]
        pulls = -expit(-margins) / len(margins)
        slope = pulls.sum() * -2.0 * (task.matrix.T @ task.features(point))
        if len(self.directions):
            slope = slope + pulls @ self.directions[chosen]
        return float(np.logaddexp(0.0, -margins).mean()), np.asarray(slope)


def best_point(
    tasks: Sequence[Task], weights: Array, lower: Array, upper: Array, starts: Sequence[Array]
) -> Array:
    """The point ``(dim,)`` of the box with the largest weighted accuracy.

    It is exact for a single task, and otherwise the best of several ascents.
    """
    if len(tasks) == 1:
        return tasks[0].centre

    def loss(point: Array) -> float:
        return -float(weights @ [task.accuracy(point) for task in tasks])

    def slope(point: Array) -> Array:
        parts = [w * task.slope(point) for w, task in zip(weights, tasks, strict=True)]
        return np.asarray(-np.sum(parts, axis=0))

    bounds = list(zip(lower, upper, strict=True))
    options = {"maxiter": 1000, "maxfun": 2000, "ftol": 1e-12, "gtol": 1e-8}
    found = [
        minimize(loss, start, jac=slope, method="L-BFGS-B", bounds=bounds, options=options)
        for start in starts
    ]
    return np.asarray(min(found, key=lambda result: result.fun).x)
