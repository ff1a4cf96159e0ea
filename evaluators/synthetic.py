"""Analytic problems with known optima and no model, for testing strategies, and faults for trying
out a cluster.

The coordinates are the coefficients of the recipe: ``x = recipe.field.values.ravel()``, float64
``(dim,)``. All objectives are minimised, and all optima lie in the unit box.

==================
===================================================================================== ``sphere``
squared distance to an optimum ``ellipsoid`` the same in rotated coordinates, with eigenvalues from
1 to 1000 ``quadratic_tasks`` one rotated quadratic per task, eigenvalues from 1 to 10, each with
its own optimum: what
                    several experts pulling in different directions look like near the base
``zdt1`` two objectives with front ``f2 = 1 - sqrt(f1)`` (Zitzler, Deb and Thiele 2000, "Comparison
                    of Multiobjective Evolutionary Algorithms: Empirical Results")
==================
=====================================================================================
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import (
    SPLITS,
    Batch,
    Candidate,
    ItemSubset,
    LossAndGradient,
    Measurement,
    Objective,
    Split,
)
from mergesearch.merging import InputError

Array = npt.NDArray[np.float64]

#: Largest over smallest eigenvalue.
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
        slopes: x ``(dim,)`` -> gradients ``(objectives, dim)``, where losses are smooth everywhere.
    """

    losses: Callable[[Array], Array]
    tradeoff: Callable[[Array], Array]
    objectives: int
    slopes: Callable[[Array], Array] | None = None

    def pareto_set(self, count: int) -> Array:
        """``(n, dim)`` Pareto-optimal points: the optimum of each objective first, ``count``
        trade-offs after them.

        With one objective that is its optimum, once.
        """
        corners = np.eye(self.objectives)
        if self.objectives == 1:
            return np.array([self.tradeoff(corners[0])])
        weights = np.concatenate([corners, _mixtures(self.objectives, count)])
        return np.array([self.tradeoff(row) for row in weights])


@dataclass(frozen=True, eq=False)
class Optimum:
    """Best point of each objective ``(objectives, dim)``, and all losses there
    ``(objectives, objectives)``.
    """

    points: Array
    losses: Array


def _mixtures(objectives: int, count: int) -> Array:
    """``count`` weightings: evenly spaced for two objectives, Dirichlet with a fixed seed for
    more.
    """
    if objectives == 2:
        first = np.linspace(0, 1, count + 2)[1:-1]
        return np.stack([1 - first, first], axis=1)
    return np.random.default_rng(0).dirichlet(np.ones(objectives), count)


def _quadratics(centres: Array, condition: float, generator: np.random.Generator) -> Problem:
    """``f_t(x) = (x - c_t)' H_t (x - c_t)`` with random rotations and eigenvalues from 1 to
    ``condition``.

    The weighted sum has its minimum at ``(Σ w_t H_t)⁻¹ Σ w_t H_t c_t``; over all weights, that is
    the Pareto set.
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

    def slopes(x: Array) -> Array:
        return np.array(
            [2 * hessian @ (x - centre) for centre, hessian in zip(centres, hessians, strict=True)]
        )

    return Problem(losses, tradeoff, tasks, slopes)


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
    """How to make a problem of any dimension, and how many objectives it may have (least, default,
    most).
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
    """The problem called ``problem`` in ``dim`` coordinates; the same seed gives the same problem.

    Raises:
        InputError: If there is no such problem, or it cannot have so many objectives or
            coordinates.
    """
    count = _objective_count(problem, objectives)
    return PROBLEMS[problem].make(dim, count, np.random.default_rng([seed, dim]))


def optimum(problem: str, dim: int, *, objectives: int | None = None, seed: int = 0) -> Optimum:
    """Where each objective of a problem is best, and the losses there, without noise."""
    made = make_problem(problem, dim, objectives=objectives, seed=seed)
    points = made.pareto_set(0)
    return Optimum(points, np.array([made.losses(point) for point in points]))


def _objective_count(problem: str, objectives: int | None, where: str = "") -> int:
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


@dataclass(frozen=True)
class Faults:
    """Share of all recipes that fail, by a hash of their digest: the same recipes each time, on
    every worker.

    Attributes:
        nan: The losses are NaN.
        error: RuntimeError.
        kill: The process that evaluates kills itself with SIGKILL.
    """

    nan: float = 0.0
    error: float = 0.0
    kill: float = 0.0

    def of(self, digest: str) -> str | None:
        """Which fault hits the recipe with ``digest``, if any."""
        place = _hash("fault", digest) / 2**64
        for name, share in (("nan", self.nan), ("error", self.error), ("kill", self.kill)):
            if place < share:
                return name
            place -= share
        return None


def _hash(*parts: object) -> int:
    """A number of 64 bits that depends on every part."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


class Synthetic:
    """Evaluates an analytic problem.

    Args:
        problem: One of :data:`PROBLEMS`.
        objectives: Number of losses, where the problem leaves a choice.
        seed: Seed of optima, rotations and noise.
        noise: Standard deviation of the measured losses; the noise is a function of seed, recipe
            and split.
        items: If positive, each loss is the mean of so many item scores, and comes with a standard
            error.
        seconds: How long an evaluation takes at least, for trying out a cluster.
        spread: How many times as long it takes at most, by recipe.
        faults: Recipes that fail, for trying out a cluster.
        where: Key of the study file, for messages.

    Raises:
        InputError: If an option is not allowed.
    """

    model_class: str | None = None
    transductive = False
    selects = True
    constraints: tuple[str, ...] = ()

    def __init__(
        self,
        problem: str,
        *,
        objectives: int | None = None,
        seed: int = 0,
        noise: float = 0.0,
        items: int = 0,
        seconds: float = 0.0,
        spread: float = 1.0,
        faults: Faults | None = None,
        where: str = "synthetic",
    ) -> None:
        count = _objective_count(problem, objectives, f"{where}.")
        names = [
            f"task {place + 1}" if problem == "quadratic_tasks" else f"f{place + 1}"
            for place in range(count)
        ]
        self.objectives = tuple(
            Objective(name, "minimize") for name in (names if count > 1 else [problem])
        )
        self.differentiable = (
            () if problem == "zdt1" else tuple(objective.name for objective in self.objectives)
        )
        given = {"items": bool(items), "gradient": bool(self.differentiable)}
        self.provides = frozenset(name for name, provided in given.items() if provided)
        self.additive = tuple(objective.name for objective in self.objectives) if items else ()
        self._problem = problem
        self._count = count
        self._seed = seed
        self._noise = noise
        self._items = items
        self._seconds = seconds
        self._spread = spread
        self._faults = faults or Faults()
        if self._faults.nan + self._faults.error + self._faults.kill > 1:
            raise InputError(
                f"{where}.faults: expected shares that sum to at most 1, received {self._faults}"
            )

    def check(self) -> None:
        """Nothing to refuse: there is no data."""

    def references(self) -> frozenset[str]:
        """None: a loss is relative to nothing."""
        return frozenset()

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """None: there are no models."""
        return []

    def open(self) -> None:
        """Nothing to load."""

    def problem(self, dim: int) -> Problem:
        """The problem in ``dim`` coordinates, without noise and faults."""
        return make_problem(self._problem, dim, objectives=self._count, seed=self._seed)

    def size(self, split: Split) -> int:
        """Items, if any."""
        return self._items

    def cost(self, split: Split, items: int | None = None) -> int:
        """One evaluation per item, or one."""
        return max(min(self._items, items or self._items), 1)

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Losses at the recipe's coefficients.

        Raises:
            RuntimeError: If a fault says so.
        """
        digest = candidate.recipe.digest
        share = _hash("time", digest) / 2**64
        time.sleep(self._seconds * (1 + (self._spread - 1) * share))
        fault = self._faults.of(digest)
        if fault == "nan":
            return Measurement({objective.name: float("nan") for objective in self.objectives})
        if fault == "error":
            raise RuntimeError(f"fault injection: recipe {digest} fails")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        x = candidate.recipe.field.values.ravel()
        losses = self.problem(x.size).losses(x)
        generator = np.random.default_rng([_hash(self._seed, digest), SPLITS.index(split)])
        if not self._items:
            noisy = losses + self._noise * generator.standard_normal(losses.shape)
            return Measurement(self._named(noisy.tolist()))
        # Noise of an item is larger by sqrt(items), so that the mean has the standard deviation
        # that was asked for.
        draws = generator.standard_normal((losses.size, self._items))
        places = items if isinstance(items, np.ndarray) else np.arange(self._items)[:items]
        scores = (losses[:, None] + self._noise * np.sqrt(self._items) * draws)[:, places]
        count = scores.shape[1]
        return Measurement(
            self._named(scores.mean(axis=1).tolist()),
            self._named((scores.std(axis=1) / np.sqrt(count)).tolist()),
            dict(zip((objective.name for objective in self.objectives), scores, strict=True)),
            weights={objective.name: np.full(count, 1 / count) for objective in self.objectives},
            places={objective.name: places for objective in self.objectives},
        )

    def _named(self, values: Iterable[float]) -> dict[str, float]:
        return {
            objective.name: value for objective, value in zip(self.objectives, values, strict=True)
        }

    def batch_cost(self, batch: Batch) -> int:
        """One evaluation: there are no items to draw from."""
        return 1

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Exact losses and gradients, whatever the batch; noise and faults concern measurements
        only.
        """
        x = candidate.recipe.field.values.ravel()
        problem = self.problem(x.size)
        assert problem.slopes is not None
        given = np.array([weights.get(objective.name, 0.0) for objective in self.objectives])
        gradient = (given @ problem.slopes(x)).reshape(candidate.recipe.field.values.shape)
        return LossAndGradient(float(given @ problem.losses(x)), gradient)
