"""Real merges that cost a millisecond: perceptrons on transformed digits, scored with accuracy.

A coefficient belongs to an expert and a block of neighbouring units. The true score is the accuracy
on held-out scans. The optimum is not known: the gap is relative to the best held-out accuracy that
an ascent saw which had the gradient on all other scans, with thousands of labels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from experiments.league.landscape import Array, Rows
from experiments.league.network_merges import NetworkMerges
from experiments.league.networks import FOLDER, Zoo, load_zoo
from experiments.league.problems import Setup, problem_of, result_of
from experiments.league.reference import kept_reference, long_reference
from mergesearch.evaluators import Batch
from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Problem, TrialResult


def make_perceptron_arena(setup: Setup) -> PerceptronArena:
    """The problem of a setup.

    Raises:
        InputError: If experts x blocks cannot have that dimension.
    """
    experts = 8 if setup.dim >= 256 else 4
    if setup.dim % experts or setup.objectives > experts or setup.dim > 100 * experts:
        raise InputError(
            f"perceptron: expected a multiple of {experts} dimensions up to {100 * experts} and at "
            f"most {experts} objectives, received {setup.dim} and {setup.objectives}"
        )
    return PerceptronArena(setup, load_zoo(experts, setup.seed))


class PerceptronArena:
    """Merges of a zoo, with search items and held-out ones.

    Args:
        setup: Which problem.
        zoo: What is merged.
    """

    def __init__(self, setup: Setup, zoo: Zoo) -> None:
        self._setup = setup
        self._merges = NetworkMerges(zoo, setup.dim // len(zoo.vectors))
        self._experts = self._merges.experts
        self._owners = np.arange(self._experts) % setup.objectives
        self._names = tuple(f"accuracy {index}" for index in range(setup.objectives))
        self._share = setup.items // self._experts
        self._fixed = self._draw(np.random.default_rng([setup.seed, 1]))
        self._start = np.full(setup.dim, 1.2 / self._experts)
        self._first = float(self.true_losses(self._start).mean())
        self.problem: Problem = self._problem()

    def measure(self, point: Array, number: int, items: int | None = None) -> TrialResult:
        """The result of evaluation ``number`` at a point, on the first ``items`` items."""
        drawn = self._fixed
        if self._setup.noise == "binomial":
            drawn = self._draw(np.random.default_rng([self._setup.seed, 2, number]))
        kept = None if items is None else max(items // self._experts, 1)
        right = self._merges.right(point, "search", [rows[:kept] for rows in drawn])
        scores = {
            name: np.stack([right[task] for task in np.flatnonzero(self._owners == index)], axis=1)
            for index, name in enumerate(self._names)
        }
        return result_of(point, scores, None if items is None else right.size)

    def true_losses(self, point: Array) -> Array:
        """Losses on held-out scans ``(objectives,)``."""
        whole = np.arange(len(self._merges.zoo.data.digits["test"]))
        right = self._merges.right(point, "test", [whole] * self._experts).mean(axis=1)
        return -np.array([right[self._owners == index].mean() for index in range(len(self._names))])

    def gap(self, point: Array) -> float:
        """0 at the reference of the mean objective, 1 at the start."""
        best = float(self._reference["mean"])
        return (float(self.true_losses(point).mean()) - best) / (self._first - best)

    @property
    def optimum(self) -> Array:
        """The best known point of the mean objective ``(dim,)``."""
        return np.array(self._reference["point"])

    @property
    def ideal(self) -> Array:
        """Smallest known held-out loss of each objective ``(objectives,)``."""
        return np.array(self._reference["each"])

    def loss_and_gradient(
        self, point: Array, batch: Batch, weights: dict[str, float]
    ) -> tuple[float, Array]:
        """Cross-entropy of a batch of search items, and its gradient ``(dim,)``."""
        rng = np.random.default_rng([batch.seed, batch.number])
        drawn = self._fixed if self._setup.noise == "items" else self._draw(rng)
        chosen = [rows[rng.permutation(len(rows))[: batch.size]] for rows in drawn]
        shares = self._shares(np.array([weights.get(name, 0.0) for name in self._names]))
        return self._merges.loss_and_gradient(point, "search", chosen, shares)

    def batch_items(self, batch: Batch) -> int:
        """Number of items of a batch."""
        size = self._share if batch.size is None else min(batch.size, self._share)
        return size * self._experts

    @cached_property
    def _reference(self) -> dict[str, Any]:
        setup = self._setup
        count = setup.objectives
        path = FOLDER / f"reference-{setup.dim}-{count}-{setup.seed}.json"
        weightings = [np.full(count, 1.0 / count), *np.eye(count)]
        return kept_reference(
            path, lambda: long_reference(self._start, weightings, self._slope, self.true_losses)
        )

    def _slope(self, weights: Array, point: Array, step: int) -> Array:
        """Gradient of an ascent's step, on training and on search scans in turn."""
        split = ("training", "search")[step % 2]
        rows = [np.arange(len(self._merges.zoo.data.digits[split]))] * self._experts
        return self._merges.loss_and_gradient(point, split, rows, self._shares(weights))[1]

    def _shares(self, weights: Array) -> Array:
        """Weight of each task ``(tasks,)`` from those of the objectives."""
        return np.asarray((weights / np.bincount(self._owners))[self._owners])

    def _draw(self, rng: np.random.Generator) -> list[Rows]:
        """Search scans of each task ``(share,)``."""
        count = len(self._merges.zoo.data.digits["search"])
        return [rng.permutation(count)[: self._share] for _ in range(self._experts)]

    def _problem(self) -> Problem:
        dim = self._setup.dim
        corners = [np.tile(row, self._merges.blocks) for row in np.eye(self._experts)]
        points = [self._start, np.zeros(dim), *corners, np.full(dim, 1.0 / self._experts)]
        # Anchors are evaluations before the first: their numbers are those from 10^9 on.
        anchors = tuple(self.measure(point, 10**9 + index) for index, point in enumerate(points))
        told = problem_of(
            self._setup, np.zeros(dim), np.ones(dim), self._start, anchors, self._experts
        )
        return replace(told, batch_items=self.batch_items)
