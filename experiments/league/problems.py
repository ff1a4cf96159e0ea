"""Problems of the league: seeded, as noisy as real scores, and with a known true loss.

``make_arena(Setup(...))`` gives an :class:`Arena`, which measures points as a study would and
knows what they are really worth. The gap of a point is 0 at the optimum and 1 at the start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from experiments.league.families import FAMILIES, Landscape
from experiments.league.landscape import Array, Items, Task, best_point
from experiments.league.merge_box import merge_box
from mergesearch.evaluators import Batch
from mergesearch.merging import InputError
from mergesearch.search.front import Normaliser
from mergesearch.search.strategies.base import Problem, TrialResult

Noise = Literal["binomial", "items"]


@dataclass(frozen=True)
class Setup:
    """Which problem.

    Attributes:
        family: A name in ``FAMILIES``, or ``perceptron``.
        dim: Number of coefficients.
        budget: Evaluations on all items.
        objectives: Number of accuracies.
        noise: ``binomial`` draws new items for each evaluation, ``items`` keeps a fixed set.
        items: Items of one evaluation, over all objectives.
        seed: Of the problem.
    """

    family: str
    dim: int
    budget: int
    objectives: int = 1
    noise: Noise = "items"
    items: int = 400
    seed: int = 0


class Arena(Protocol):
    """A problem that measures points, and knows their true losses."""

    @property
    def problem(self) -> Problem:
        """What a strategy is told."""

    @property
    def optimum(self) -> Array:
        """The best known point of the mean objective ``(dim,)``."""

    @property
    def ideal(self) -> Array:
        """Smallest known true loss of each objective ``(objectives,)``."""

    def measure(self, point: Array, number: int, items: int | None = None) -> TrialResult:
        """The result of evaluation ``number`` at a point, on the first ``items`` items."""

    def true_losses(self, point: Array) -> Array:
        """Losses over all conceivable items ``(objectives,)``."""

    def gap(self, point: Array) -> float:
        """0 at the optimum of the mean objective, 1 at the start."""

    def loss_and_gradient(
        self, point: Array, batch: Batch, weights: dict[str, float]
    ) -> tuple[float, Array]:
        """A smooth loss of a batch, and its gradient ``(dim,)``."""

    def batch_items(self, batch: Batch) -> int:
        """Number of items of a batch."""


def make_arena(setup: Setup) -> Arena:
    """The problem of a setup.

    Raises:
        InputError: If the family is not known, or does not have such a problem.
    """
    if setup.family == "perceptron":
        from experiments.league.perceptron import make_perceptron_arena

        return make_perceptron_arena(setup)
    if setup.family not in FAMILIES:
        raise InputError(
            f"family: expected one of {sorted([*FAMILIES, 'perceptron'])}, received "
            f"{setup.family!r}"
        )
    if setup.family == "plateau" and setup.objectives > 1:
        raise InputError(f"plateau: expected one objective, received {setup.objectives}")
    rng = np.random.default_rng([setup.seed, setup.dim, setup.objectives])
    landscape = FAMILIES[setup.family](setup.dim, setup.objectives, rng)
    if setup.noise == "binomial":
        tasks = tuple(replace(task, pull=0.0) for task in landscape.tasks)
        landscape = replace(landscape, tasks=tasks)
    return MadeArena(setup, landscape)


class MadeArena:
    """A made landscape with its items.

    Args:
        setup: Which problem.
        landscape: Its box and tasks.
    """

    def __init__(self, setup: Setup, landscape: Landscape) -> None:
        self._setup = setup
        self._landscape = landscape
        self._names = tuple(f"accuracy {index}" for index in range(setup.objectives))
        owners = np.array(landscape.owners)
        self._members = [np.flatnonzero(owners == index) for index in range(setup.objectives)]
        self._share = setup.items // len(landscape.tasks)
        self._fixed = self._draw(np.random.default_rng([setup.seed, 1]))
        self.optimum = self._optimum(range(setup.objectives))
        self._ends = (self._mean_loss(self.optimum), self._mean_loss(landscape.start))
        own = [self.true_losses(self._optimum([index])) for index in range(setup.objectives)]
        self.ideal = np.min([*own, self.true_losses(self.optimum)], axis=0)
        self.problem = self._problem()

    def measure(self, point: Array, number: int, items: int | None = None) -> TrialResult:
        """The result of evaluation ``number`` at a point, on the first ``items`` items."""
        drawn = self._fixed
        if self._setup.noise == "binomial":
            drawn = self._draw(np.random.default_rng([self._setup.seed, 2, number]))
        kept = None if items is None else max(items // len(drawn), 1)
        right = [
            (own.margins(task, point)[:kept] > 0.0).astype(np.float64)
            for task, own in zip(self._landscape.tasks, drawn, strict=True)
        ]
        scores = {
            name: np.stack([right[task] for task in members], axis=1)
            for name, members in zip(self._names, self._members, strict=True)
        }
        return result_of(point, scores, None if items is None else len(right) * len(right[0]))

    def true_losses(self, point: Array) -> Array:
        """Losses over all conceivable items ``(objectives,)``."""
        accuracies = np.array([task.accuracy(point) for task in self._landscape.tasks])
        return -np.array([accuracies[members].mean() for members in self._members])

    def gap(self, point: Array) -> float:
        """0 at the optimum of the mean objective, 1 at the start."""
        best, start = self._ends
        return (self._mean_loss(point) - best) / (start - best)

    def loss_and_gradient(
        self, point: Array, batch: Batch, weights: dict[str, float]
    ) -> tuple[float, Array]:
        """Cross-entropy of a batch, weighted by objective, and its gradient ``(dim,)``."""
        rng = np.random.default_rng([batch.seed, batch.number])
        drawn = self._fixed if self._setup.noise == "items" else self._draw(rng)
        loss = 0.0
        slope = np.zeros(point.size)
        for name, members in zip(self._names, self._members, strict=True):
            for index in members:
                chosen = rng.permutation(self._share)[: batch.size]
                task = self._landscape.tasks[index]
                value, part = drawn[index].loss_and_slope(task, point, chosen)
                weight = weights.get(name, 0.0) / len(members)
                loss += weight * value
                slope += weight * part
        return loss, slope

    def batch_items(self, batch: Batch) -> int:
        """Number of items of a batch."""
        size = self._share if batch.size is None else min(batch.size, self._share)
        return size * len(self._landscape.tasks)

    def _mean_loss(self, point: Array) -> float:
        return float(self.true_losses(point).mean())

    def _draw(self, rng: np.random.Generator) -> list[Items]:
        return [Items.draw(task, self._share, rng) for task in self._landscape.tasks]

    def _optimum(self, objectives: list[int] | range) -> Array:
        land = self._landscape
        chosen = [(task, index) for index in objectives for task in self._members[index]]
        tasks: list[Task] = [land.tasks[task] for task, _ in chosen]
        weights = np.array([1.0 / len(self._members[index]) for _, index in chosen])
        centres = [task.centre for task in tasks]
        middle = np.clip(np.mean(centres, axis=0), land.lower, land.upper)
        starts = [land.start, middle, *centres[:4]]
        return best_point(tasks, weights / weights.sum(), land.lower, land.upper, starts)

    def _problem(self) -> Problem:
        land = self._landscape
        # Anchors are evaluations before the first: their numbers are those from 10^9 on.
        anchors = tuple(
            self.measure(point, 10**9 + index) for index, point in enumerate(land.anchors)
        )
        problem = problem_of(self._setup, land.lower, land.upper, land.start, anchors, land.experts)
        return replace(problem, batch_items=self.batch_items)


def result_of(point: Array, scores: dict[str, Array], evaluated: int | None) -> TrialResult:
    """The result of scores by objective, each ``(items, tasks)``, with standard errors.

    Errors are those within tasks, as an evaluator computes them for domains. Tasks take turns in
    the order of items, so that the first so many items are as balanced as all.
    """
    losses = -np.array([values.mean() for values in scores.values()])
    errors = np.array(
        [
            np.sqrt(np.sum(values.var(axis=0) / len(values))) / values.shape[1]
            for values in scores.values()
        ]
    )
    items = {name: values.ravel() for name, values in scores.items()}
    return TrialResult(None, point, losses, items, evaluated, errors=errors)


def problem_of(
    setup: Setup,
    lower: Array,
    upper: Array,
    start: Array,
    anchors: tuple[TrialResult, ...],
    experts: int,
) -> Problem:
    """What a strategy is told of a problem with measured anchors.

    With ``experts``, the coordinates have the names that a study gives them.
    """
    names = tuple(f"accuracy {index}" for index in range(setup.objectives))
    losses = [anchor.losses for anchor in anchors if anchor.losses is not None]
    return Problem(
        lower=lower,
        upper=upper,
        start=start,
        objectives=setup.objectives,
        budget=setup.budget,
        scale=Normaliser.from_anchors(np.array(losses)).scale,
        weights=np.full(setup.objectives, 1.0 / setup.objectives),
        anchors=anchors,
        signs=np.full(setup.objectives, -1.0),
        names=names,
        items=setup.items,
        differentiable=names,
        space=merge_box(lower, upper, start, experts) if experts else None,
    )
