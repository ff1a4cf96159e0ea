"""Frank-Wolfe merging: step towards whichever checkpoint the gradient of the loss points to.

Chen 2025, "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization" (arXiv 2503.12649),
after Frank and Wolfe 1956, "An algorithm for quadratic programming". It minimises the loss over the
convex hull of the checkpoints. At each point, the vertex s that minimises <g, s> is found for every
group of the space (``layer``) or for the whole model (``task``), and the merge moves to θ + γ (s −
θ) with γ = 2 / (t + 2) times a step size. The gap <g, θ − s> bounds how far a convex loss is above
its minimum; it is recorded, and may end the search. What we changed:

* The oracle is exact: <g, s> is the inner product of the coefficients' gradient with those of a
  vertex. The authors take the smallest cosine between g and the *whole* checkpoint, summed over
  tensors, which counts a bias as much as a matrix and is another problem's solution;
  ``oracle: cosine`` is theirs. Where no cosine of a group is negative it stays (theirs pulls it to
  the origin).
* The base is a vertex too, unless told otherwise.
* ``soft``: each objective's gradient names a vertex, and Adam then moves the coefficients of all
  vertices named so far, from 0.3 in the first round (the authors' AdaMerging inside).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field as Bound

from mergesearch.evaluators import Batch
from mergesearch.search.strategies.base import Point, Problem, TrialResult
from mergesearch.search.strategies.expert_merging import directions_of
from mergesearch.search.strategies.parts.gradient_walks import (
    GradientWalk,
    ParallelWalks,
    Walk,
    WalkStep,
    followed,
    varied,
)
from mergesearch.search.workers.gradient_steps import (
    Array,
    GradientSteps,
    OptimizerConfig,
    OptimizerState,
)

#: Where coefficients begin in the first round of ``soft``, as a share of the way to their vertex.
FIRST_SHARE = 0.3

Granularity = Literal["layer", "task"]


class FrankWolfe(ParallelWalks):
    """Frank-Wolfe over the convex hull of the checkpoints.

    Args:
        problem: The box, and which objectives have gradients.
        seed: Shuffles the items.
        variant: ``hard``: steps towards one vertex at a time; ``soft``: vertices join, Adam moves
            their coefficients.
        oracle: ``exact``: the vertex with the smallest inner product; ``cosine``: the published
            rule.
        granularity: A vertex for every group of the space (``layer``), or one for the whole model
            (``task``).
        step_size: Factor of γ.
        batch_size: Items of every domain in a gradient; 0 takes all of them.
        base: Whether the base is a vertex.
        gap: The search ends when the gap of the exact oracle is not above this; by default it goes
            on.
        steps: Steps of Adam in a round of ``soft``.
        learning_rate: Of Adam in ``soft``.
        objectives: Names of the objectives to follow, by default all that have gradients.
        restarts_in_parallel: Restarts that run at a time, at most; by default as many as keep the
            workers busy.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        variant: Literal["hard", "soft"] = "hard",
        oracle: Literal["exact", "cosine"] = "exact",
        granularity: Granularity = "layer",
        step_size: Annotated[float, Bound(gt=0, le=1)] = 1.0,
        batch_size: Annotated[int, Bound(ge=0)] = 100,
        base: bool = True,
        gap: Annotated[float, Bound(gt=0)] | None = None,
        steps: Annotated[int, Bound(ge=1)] = 50,
        learning_rate: Annotated[float, Bound(gt=0)] = 1e-3,
        objectives: list[str] | None = None,
        restarts_in_parallel: Annotated[int, Bound(ge=1)] | None = None,
    ) -> None:
        hull = Hull.of(problem, base=base and oracle == "exact", granularity=granularity)
        config = OptimizerConfig(
            problem.lower,
            problem.upper,
            hull.centre,
            followed(problem, objectives, "frank_wolfe"),
            learning_rate=learning_rate,
            batch=Batch(size=batch_size or None, seed=seed),
            measure="gradient" if oracle == "exact" else "cosine",
        )

        def make(number: int) -> Walk:
            own = varied(config, number)
            return (
                _Soft(hull, own, steps) if variant == "soft" else _Hard(hull, own, step_size, gap)
            )

        super().__init__(problem, make, restarts_in_parallel)


@dataclass(frozen=True, eq=False)
class Hull:
    """The checkpoints as points of the box.

    Attributes:
        low, high: Coefficient of an expert that is not the vertex, and of the one that is: 0 and 1,
            or as near as the box allows, ``(dim,)``.
        experts: Directions K; coordinates are ``(K, groups)``.
        base: Whether the base is a vertex.
        granularity: A vertex for every group, or one for all.
    """

    low: Array
    high: Array
    experts: int
    base: bool
    granularity: Granularity

    @classmethod
    def of(cls, problem: Problem, *, base: bool, granularity: Granularity) -> Hull:
        """The hull of a problem's directions.

        In a plain box every coordinate is a direction with the vertices 0 and 1.
        """
        low, high = (np.clip(value, problem.lower, problem.upper) for value in (0.0, 1.0))
        experts = directions_of(problem)
        return cls(low, high, experts, base or experts == 1, granularity)

    @property
    def centre(self) -> Point:
        """The uniform average of the experts ``(dim,)``."""
        return np.asarray(self.low + (self.high - self.low) / self.experts)

    def choose(self, scores: Array) -> npt.NDArray[np.intp]:
        """The expert with the smallest score in every group ``(groups,)``; -1 for the base.

        Args:
            scores: Of every coordinate ``(dim,)``: what choosing that expert there adds.
        """
        table = scores.reshape(self.experts, -1)
        if self.granularity == "task":
            table = np.repeat(table.sum(axis=1, keepdims=True), table.shape[1], axis=1)
        chosen = table.argmin(axis=0)
        return np.where(table.min(axis=0) >= 0.0, -1, chosen) if self.base else chosen

    def members(self, chosen: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Coordinates of the chosen experts, bool ``(dim,)``."""
        return np.asarray((np.arange(self.experts)[:, None] == chosen).ravel())

    def vertex(self, chosen: npt.NDArray[np.intp]) -> Point:
        """The point of a choice ``(dim,)``."""
        return np.where(self.members(chosen), self.high, self.low)


class _Hard:
    """A walk that steps towards one vertex at a time."""

    def __init__(
        self, hull: Hull, config: OptimizerConfig, step_size: float, tolerance: float | None
    ) -> None:
        self._hull = hull
        self._config = config
        self._step_size = step_size
        self._tolerance = tolerance
        self._point = hull.centre
        self._done = 0
        self._waits = False
        self.over = False
        self._gap: float | None = None

    @property
    def point(self) -> Point:
        """Where the walk stands ``(dim,)``."""
        return self._point

    def propose(self) -> WalkStep | None:
        """The gradient at the walk's point."""
        if self._waits or self.over:
            return None
        self._waits = True
        notes = {} if self._gap is None else {"gap before": self._gap}
        return WalkStep(
            self._point, _gradient_only(self._config, self._point, self._done), notes=notes
        )

    def learn(self, step: WalkStep, result: TrialResult) -> None:
        """Step towards the vertex; a failure halves the steps."""
        self._waits = False
        gradient = None if result.gradient_result is None else result.gradient_result.gradient
        if gradient is None:
            self._step_size /= 2
            return
        cosine = self._config.measure == "cosine"
        # <g, s> up to a constant: what a coordinate adds when it goes from low to high
        scores = gradient * (1.0 if cosine else self._hull.high - self._hull.low)
        target = self._hull.vertex(self._hull.choose(scores))
        if cosine and not self._hull.base:
            target = np.where(self._moves(scores), target, self._point)
        if not cosine:
            # The gap <g, x − s> bounds f(x) − f(x*) of a convex f.
            self._gap = float(gradient @ (self._point - target))
            self.over = self._tolerance is not None and self._gap <= self._tolerance
        self._done += 1
        # x + γ (s − x), γ = 2 / (t + 2) times the step size, t from 0 (Frank and Wolfe 1956, with
        # the step of Jaggi 2013, "Revisiting Frank-Wolfe", algorithm 1)
        gamma = min(2.0 / (self._done + 1) * self._step_size, 1.0)
        self._point = self._point + gamma * (target - self._point)

    def _moves(self, cosines: Array) -> npt.NDArray[np.bool_]:
        """Coordinates of the groups that move, bool ``(dim,)``: where a cosine is negative."""
        table = cosines.reshape(self._hull.experts, -1)
        return np.tile(table.min(axis=0) < 0.0, self._hull.experts)


class _Soft:
    """A walk in rounds: the objectives name vertices, then Adam moves the named coefficients."""

    def __init__(self, hull: Hull, config: OptimizerConfig, steps: int) -> None:
        self._hull = hull
        self._config = config
        self._steps = steps
        self._names = list(config.weights)
        self._point = hull.low
        self._active = np.zeros(hull.low.size, np.bool_)
        self._round = 0
        self.over = False
        self._given = 0  # objectives whose gradients have been asked for in this round
        self._gradients: dict[int, Array] = {}
        self._walk: GradientWalk | None = None

    @property
    def point(self) -> Point:
        """Where the walk stands ``(dim,)``."""
        return self._point

    def propose(self) -> WalkStep | None:
        """A gradient of each objective, then the steps of a round."""
        if self._walk is not None:
            return self._walk.propose()
        token = self._given
        if token == len(self._names):
            return None
        self._given += 1
        config = replace(self._config, weights={self._names[token]: 1.0})
        items = None if token == 0 and self._round == 0 else 0
        return WalkStep(self._point, _gradient_only(config, self._point, self._round), items, token)

    def learn(self, step: WalkStep, result: TrialResult) -> None:
        """Collect the vertices that the objectives name, then go where the steps led."""
        if self._walk is not None:
            self._walk.learn(step, result)
            if result.gradient_result is not None:
                self._point = self._walk.point
                self._walk = None
            return
        gradient = None if result.gradient_result is None else result.gradient_result.gradient
        self._gradients[step.token] = np.zeros_like(self._point) if gradient is None else gradient
        if len(self._gradients) == len(self._names):
            self._join()

    def _join(self) -> None:
        """Add the vertices that the objectives name, and begin the steps of a round."""
        width = self._hull.high - self._hull.low
        named = self._active.copy()
        for token in range(len(self._names)):
            named |= self._hull.members(self._hull.choose(self._gradients[token] * width))
        if not self._round:
            self._point = np.where(named, self._hull.low + FIRST_SHARE * width, self._point)
        self._active = named
        self._round = self._round + 1
        self._given = 0
        self._gradients = {}
        # Batches go on from those of the rounds before.
        batch = replace(self._config.batch, number=self._round * self._steps)
        config = replace(self._config, trainable=named, measure="gradient", batch=batch)
        self._walk = GradientWalk(config, self._point, self._steps)


def _gradient_only(config: OptimizerConfig, point: Point, number: int) -> GradientSteps:
    """Take a gradient without a step, on a batch of its own."""
    return GradientSteps(
        replace(config, batch=replace(config.batch, number=config.batch.number + number)),
        _state_at(point),
        0,
    )


def _state_at(point: Point) -> OptimizerState:
    """The state of a walk that has taken no steps."""
    return OptimizerState(point, np.zeros((2, point.size)))
