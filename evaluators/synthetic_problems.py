"""Analytic problems with known optima and no model, for testing strategies.

Coordinates are float64 ``(dim,)``. All objectives are minimised, and all optima lie in the unit
box.

* ``sphere``: squared distance to an optimum.
* ``ellipsoid``: the same in rotated coordinates, with eigenvalues from 1 to 1000.
* ``quadratic_tasks``: one rotated quadratic per task, eigenvalues from 1 to 10, each with its own
  optimum: what several experts that pull in different directions look like near the base.
* ``zdt1``: two objectives with front ``f2 = 1 - sqrt(f1)`` (Zitzler, Deb and Thiele 2000,
  "Comparison of Multiobjective Evolutionary Algorithms: Empirical Results").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mergesearch.merging import InputError

Array = npt.NDArray[np.float64]

#: Ratios of the largest to the smallest eigenvalue.
ELLIPSOID_CONDITION = 1e3
TASK_CONDITION = 10.0


@dataclass(frozen=True, eq=False)
class Problem:
    """A problem of ``dim`` coordinates.

    Attributes:
        losses: x ``(dim,)`` -> losses ``(objectives,)``.
        tradeoff: weights ``(objectives,)``, summing to 1 -> the Pareto-optimal point ``(dim,)`` of
            that weighting.
        objectives: Number of losses.
        gradients: x ``(dim,)`` -> gradients ``(objectives, dim)``; None where losses are not smooth
            everywhere.
    """

    losses: Callable[[Array], Array]
    tradeoff: Callable[[Array], Array]
    objectives: int
    gradients: Callable[[Array], Array] | None = None

    def pareto_set(self, count: int) -> Array:
        """Pareto-optimal points ``(n, dim)``.

        The optimum of each objective comes first, ``count`` trade-offs follow. With one objective
        there is one point, its optimum.
        """
        corners = np.eye(self.objectives)
        if self.objectives == 1:
            return np.array([self.tradeoff(corners[0])])
        weights = np.concatenate([corners, _mixtures(self.objectives, count)])
        return np.array([self.tradeoff(row) for row in weights])


@dataclass(frozen=True, eq=False)
class Optimum:
    """The best point of each objective.

    Attributes:
        points: One point of each objective ``(objectives, dim)``.
        losses: All losses at each of them ``(objectives, objectives)``.
    """

    points: Array
    losses: Array


def _mixtures(objectives: int, count: int) -> Array:
    """Make ``count`` weightings ``(count, objectives)``.

    They are evenly spaced for two objectives, and drawn from a Dirichlet distribution with a fixed
    seed for more.
    """
    if objectives == 2:
        first = np.linspace(0, 1, count + 2)[1:-1]
        return np.stack([1 - first, first], axis=1)
    return np.random.default_rng(0).dirichlet(np.ones(objectives), count)


def _quadratics(centres: Array, condition: float, generator: np.random.Generator) -> Problem:
    """Make ``f_t(x) = (x - c_t)' H_t (x - c_t)`` of random rotations.

    Eigenvalues run from 1 to ``condition``. The weighted sum has its minimum at
    ``(Σ w_t H_t)⁻¹ Σ w_t H_t c_t``; over all weights, that is the Pareto set.
    """
    tasks, dim = centres.shape
    eigenvalues = condition ** np.linspace(0, 1, dim) if dim > 1 else np.ones(1)
    hessians = np.empty((tasks, dim, dim))
    for task in range(tasks):
        rotation = np.linalg.qr(generator.standard_normal((dim, dim)))[0]
        hessians[task] = (rotation * eigenvalues) @ rotation.T

    def losses(x: Array) -> Array:
        offsets = x - centres
        return np.array(
            [offset @ hessian @ offset for offset, hessian in zip(offsets, hessians, strict=True)]
        )

    def tradeoff(weights: Array) -> Array:
        if weights.max() == 1.0:
            return np.asarray(centres[int(weights.argmax())])
        right = np.einsum("t,tij,tj->i", weights, hessians, centres)
        return np.asarray(np.linalg.solve(np.tensordot(weights, hessians, 1), right))

    def gradients(x: Array) -> Array:
        return np.array(
            [2 * hessian @ (x - centre) for centre, hessian in zip(centres, hessians, strict=True)]
        )

    return Problem(losses, tradeoff, tasks, gradients)


def _centres(generator: np.random.Generator, tasks: int, dim: int) -> Array:
    return generator.uniform(0.2, 0.8, (tasks, dim))


def _sphere(dim: int, objectives: int, generator: np.random.Generator) -> Problem:
    centre = _centres(generator, 1, dim)[0]
    return Problem(
        lambda x: np.array([np.sum((x - centre) ** 2)]),
        lambda weights: centre,
        1,
        lambda x: 2 * (x - centre)[None],
    )


def _ellipsoid(dim: int, objectives: int, generator: np.random.Generator) -> Problem:
    return _quadratics(_centres(generator, 1, dim), ELLIPSOID_CONDITION, generator)


def _quadratic_tasks(dim: int, objectives: int, generator: np.random.Generator) -> Problem:
    return _quadratics(_centres(generator, objectives, dim), TASK_CONDITION, generator)


def _zdt1(dim: int, objectives: int, generator: np.random.Generator) -> Problem:
    if dim < 2:
        raise InputError(
            f"problem: zdt1 needs at least 2 coordinates, received {dim}; set space.dim"
        )

    def losses(x: Array) -> Array:
        # Only defined in the unit box: outside it, the value at the nearest point plus the squared
        # distance to it.
        inside = np.clip(x, 0, 1)
        g = 1 + 9 * inside[1:].mean()
        front = np.array([inside[0], g * (1 - np.sqrt(inside[0] / g))])
        return front + np.sum((x - inside) ** 2)

    def tradeoff(weights: Array) -> Array:
        # d/df1 of w1 f1 + w2 (1 - sqrt(f1)) vanishes at sqrt(f1) = w2 / (2 w1).
        root = 1.0 if weights[0] == 0 else min(1.0, weights[1] / (2 * weights[0]))
        return np.concatenate([[root**2], np.zeros(dim - 1)])

    return Problem(losses, tradeoff, 2)


@dataclass(frozen=True)
class ProblemFamily:
    """A kind of problem that can be made in any dimension.

    Attributes:
        make: Dimension, number of objectives, generator -> problem.
        objectives: How many objectives it may have: least, default, most.
    """

    make: Callable[[int, int, np.random.Generator], Problem]
    objectives: tuple[int, int, float]


PROBLEMS: dict[str, ProblemFamily] = {
    "sphere": ProblemFamily(_sphere, (1, 1, 1)),
    "ellipsoid": ProblemFamily(_ellipsoid, (1, 1, 1)),
    "quadratic_tasks": ProblemFamily(_quadratic_tasks, (1, 2, float("inf"))),
    "zdt1": ProblemFamily(_zdt1, (2, 2, 2)),
}


@lru_cache(maxsize=8)
def make_problem(
    problem: str, dim: int, *, objectives: int | None = None, seed: int = 0
) -> Problem:
    """Make the problem called ``problem`` in ``dim`` coordinates.

    The same seed gives the same problem.

    Raises:
        InputError: If there is no such problem, or it cannot have so many objectives or
            coordinates.
    """
    count = objective_count(problem, objectives)
    return PROBLEMS[problem].make(dim, count, np.random.default_rng([seed, dim]))


def optimum(problem: str, dim: int, *, objectives: int | None = None, seed: int = 0) -> Optimum:
    """Find where each objective of a problem is best, and the losses there, without noise."""
    made = make_problem(problem, dim, objectives=objectives, seed=seed)
    points = made.pareto_set(0)
    return Optimum(points, np.array([made.losses(point) for point in points]))


def objective_count(problem: str, objectives: int | None, where: str = "") -> int:
    """The number of objectives of a problem, by default its own.

    Raises:
        InputError: If there is no such problem, or it cannot have so many objectives.
    """
    if problem not in PROBLEMS:
        raise InputError(
            f"{where}problem: expected one of {sorted(PROBLEMS)}, received {problem!r}"
        )
    least, default, most = PROBLEMS[problem].objectives
    count = default if objectives is None else objectives
    if not least <= count <= most:
        allowed = f"at least {least}" if least != most else f"{least}"
        raise InputError(f"{where}objectives: expected {allowed} for {problem}, received {count}")
    return count
