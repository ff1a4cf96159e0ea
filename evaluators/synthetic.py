"""The evaluator of analytic problems, with noise, and with faults for trying out a cluster."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

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
from mergesearch.evaluators.evaluator_base import EvaluatorBase
from mergesearch.evaluators.synthetic_problems import Problem, make_problem, objective_count
from mergesearch.merging import InputError


@dataclass(frozen=True)
class Faults:
    """Shares of all recipes that fail.

    A hash of a recipe's digest decides, so that the same recipes fail each time and on every
    worker.

    Attributes:
        nan: Share whose losses are NaN.
        error: Share that raises RuntimeError.
        kill: Share for which the evaluating process kills itself with SIGKILL.
    """

    nan: float = 0.0
    error: float = 0.0
    kill: float = 0.0

    def of(self, digest: str) -> str | None:
        """The fault that hits the recipe with ``digest``, if any."""
        position = _hash("fault", digest) / 2**64
        for name, share in (("nan", self.nan), ("error", self.error), ("kill", self.kill)):
            if position < share:
                return name
            position -= share
        return None


def _hash(*parts: object) -> int:
    """Make a number of 64 bits that depends on every part."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


class Synthetic(EvaluatorBase):
    """Evaluates an analytic problem at the coefficients of a recipe.

    The coordinates are ``x = recipe.field.values.ravel()``, float64 ``(dim,)``.

    Args:
        problem: A key of :data:`mergesearch.evaluators.synthetic_problems.PROBLEMS`.
        objectives: Number of losses, where the problem leaves a choice.
        seed: Seed of optima, rotations and noise.
        noise: Standard deviation of the measured losses; the noise is a function of seed, recipe
            and split.
        items: If positive, each loss is the mean of so many item scores, and comes with a standard
            error.
        seconds: Least seconds that an evaluation takes, for trying out a cluster.
        spread: Factor by which it takes longer at most; how much longer depends on the recipe.
        faults: Recipes that fail, for trying out a cluster.
        where: Key of the study file, for messages.

    Raises:
        InputError: If an option is not allowed.
    """

    selects = True
    deterministic = True
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
        count = objective_count(problem, objectives, f"{where}.")
        names = [
            f"task {number}" if problem == "quadratic_tasks" else f"f{number}"
            for number in range(1, count + 1)
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

    def problem(self, dim: int) -> Problem:
        """The problem in ``dim`` coordinates, without noise and faults."""
        return make_problem(self._problem, dim, objectives=self._count, seed=self._seed)

    def size(self, split: Split) -> int:
        """The same number of items in every split, 0 where there are none."""
        return self._items

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Compute the losses at the recipe's coefficients.

        Raises:
            RuntimeError: If the recipe is among those that shall fail.
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
        indices = items if isinstance(items, np.ndarray) else np.arange(self._items)[:items]
        scores = (losses[:, None] + self._noise * np.sqrt(self._items) * draws)[:, indices]
        count = scores.shape[1]
        return Measurement(
            self._named(scores.mean(axis=1).tolist()),
            self._named((scores.std(axis=1) / np.sqrt(count)).tolist()),
            dict(zip((objective.name for objective in self.objectives), scores, strict=True)),
            weights={objective.name: np.full(count, 1 / count) for objective in self.objectives},
            item_indices={objective.name: indices for objective in self.objectives},
        )

    def _named(self, values: Iterable[float]) -> dict[str, float]:
        return {
            objective.name: value for objective, value in zip(self.objectives, values, strict=True)
        }

    def batch_cost(self, batch: Batch, names: Collection[str] | None = None) -> int:
        """One evaluation, since there are no items to draw from."""
        return 1

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Compute exact losses and gradients, whatever the batch.

        Noise and faults concern measurements only.
        """
        x = candidate.recipe.field.values.ravel()
        problem = self.problem(x.size)
        assert problem.gradients is not None
        given = np.array([weights.get(objective.name, 0.0) for objective in self.objectives])
        gradient = (given @ problem.gradients(x)).reshape(candidate.recipe.field.values.shape)
        return LossAndGradient(float(given @ problem.losses(x)), gradient)
