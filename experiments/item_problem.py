"""Merges whose true scores are known, measured on items like those of a real benchmark.

An item ``k`` of a split is answered rightly by the merge ``x`` if

    q(x) + s · w_k · (x − x₀) + z_k > 0,    w_k, z_k standard normal,

so that merges that are close to each other answer alike, a search can fit its own items, and the
true accuracy is ``Φ(q(x) / sqrt(1 + s² |x − x₀|²))``. The second objective is a loss per item,
``1 − (r(x) + s · w_k · (x − x₀) + z_k)``, with true value ``1 − r(x)``. ``q`` and ``r`` are
quadratic with optima of their own, or such that every merge is equally good.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import SPLITS, Candidate, Measurement, Objective, Split
from mergesearch.evaluators.base import ItemSubset
from mergesearch.evaluators.evaluator_base import EvaluatorBase
from mergesearch.search.fidelity.rules import NeverStop, measure_in_stages
from mergesearch.search.plan.anchors import Anchor
from mergesearch.search.plan.plan import Plan
from mergesearch.search.workers.messages import Outcome, Task

Array = npt.NDArray[np.float64]

OBJECTIVES = (Objective("accuracy", "maximize"), Objective("loss", "minimize"))
#: Probits by which the start lies below the optimum, and those of the optimum.
RISE = 0.7
TOP = 0.95
#: Probits of every merge where there is nothing to find.
FLAT = 0.5
#: How much answers of single items depend on the merge.
DIVERSITY = 0.6
#: Anchors beside the start, at random around it.
RIVALS = 6


@dataclass(frozen=True, eq=False)
class ItemProblem:
    """A problem and its items.

    Attributes:
        dim: Number of coordinates; merges lie in the unit box.
        seed: Seeds the optima and the items.
        items: Split -> number of items.
        effect: Whether any merge is better than another.
    """

    dim: int
    seed: int
    items: dict[Split, int]
    effect: bool = True
    _drawn: dict[Split, tuple[Array, Array]] = field(default_factory=dict, repr=False)

    @cached_property
    def start(self) -> Array:
        """Where the search begins, ``(dim,)``."""
        return np.full(self.dim, 0.3)

    @cached_property
    def optima(self) -> Array:
        """Best point of each objective, ``(2, dim)``."""
        steps = np.random.default_rng([self.seed, 9]).standard_normal((2, self.dim))
        steps *= 0.125 * math.sqrt(self.dim) / np.linalg.norm(steps, axis=1, keepdims=True)
        return np.clip(self.start + steps, 0, 1)

    @cached_property
    def _curvature(self) -> Array:
        generator = np.random.default_rng([self.seed, 8])
        turn = np.linalg.qr(generator.standard_normal((self.dim, self.dim)))[0]
        curvature: Array = (turn * np.logspace(0, 1.3, self.dim)) @ turn.T
        return curvature

    def probits(self, point: Array) -> Array:
        """``q`` and ``r`` of a merge, ``(2,)``."""
        if not self.effect:
            return np.array([FLAT * self._stretch(point), FLAT])
        gaps = point - self.optima
        way = self.start - self.optima
        heights = np.einsum("od,de,oe->o", gaps, self._curvature, gaps)
        rise = np.einsum("od,de,oe->o", way, self._curvature, way)
        return np.asarray(TOP - RISE * heights / rise)

    def truth(self, point: Array) -> Array:
        """True accuracy and loss of a merge, ``(2,)``."""
        skill, gain = self.probits(point)
        accuracy = 0.5 * (1 + math.erf(skill / self._stretch(point) / math.sqrt(2)))
        return np.array([accuracy, 1 - gain])

    def _stretch(self, point: Array) -> float:
        step = point - self.start
        return math.sqrt(1 + DIVERSITY**2 * float(step @ step))

    def scores(self, point: Array, split: Split) -> Array:
        """Scores of a split's items, ``(2, items)``."""
        if split not in self._drawn:
            generator = np.random.default_rng([self.seed, SPLITS.index(split)])
            count = self.items[split]
            slopes = DIVERSITY * generator.standard_normal((count, self.dim))
            self._drawn[split] = (slopes, generator.standard_normal(count))
        slopes, levels = self._drawn[split]
        margins = self.probits(point)[:, None] + slopes @ (point - self.start) + levels
        return np.stack([(margins[0] > 0).astype(np.float64), 1 - margins[1]])


class ItemEvaluator(EvaluatorBase):
    """Evaluates a problem at the coefficients of a recipe.

    Args:
        problem: The problem.
        objectives: Number of objectives, 1 or 2.
    """

    provides = frozenset({"items"})
    selects = True
    constraints: tuple[str, ...] = ()

    def __init__(self, problem: ItemProblem, objectives: int = 1) -> None:
        self.objectives = OBJECTIVES[:objectives]
        self.additive = tuple(objective.name for objective in self.objectives)
        self._problem = problem

    def size(self, split: Split) -> int:
        """Number of items of a split."""
        return self._problem.items[split]

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Score the items that are asked for."""
        point = candidate.recipe.field.values.ravel()
        size = self.size(split)
        indices = items if isinstance(items, np.ndarray) else np.arange(size)[:items]
        rows = dict(
            zip(self.additive, self._problem.scores(point, split)[:, indices], strict=False)
        )
        count = len(indices)
        return Measurement(
            {name: float(row.mean()) for name, row in rows.items()},
            {name: float(row.std() / math.sqrt(count)) for name, row in rows.items()},
            rows,
            weights={name: np.full(count, 1 / count) for name in rows},
            item_indices=dict.fromkeys(rows, indices),
        )


def anchors_of(problem: ItemProblem) -> list[Array]:
    """The start, and :data:`RIVALS` merges at random around it."""
    steps = np.random.default_rng([problem.seed, 7]).standard_normal((RIVALS, problem.dim))
    return [problem.start, *np.clip(problem.start + 0.12 * steps, 0, 1)]


def with_items(plan: Plan, problem: ItemProblem, objectives: int = 1, rivals: int = RIVALS) -> Plan:
    """The plan of an analytic study, with this evaluator and several anchors in its place."""
    added = [
        Anchor(f"rival {number}", plan.space.decode(point))
        for number, point in enumerate(anchors_of(problem)[1 : rivals + 1], 1)
    ]
    evaluator = ItemEvaluator(problem, objectives)
    return replace(plan, evaluator=evaluator, anchors=(*plan.anchors, *added))


class Local:
    """A backend that evaluates in this process, without weights.

    Args:
        evaluator: What evaluates.
    """

    slots = 1

    def __init__(self, evaluator: ItemEvaluator) -> None:
        self._evaluator = evaluator
        self._tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        """Queue the task."""
        self._tasks.append(task)

    def wait(self) -> list[Outcome]:
        """Run the oldest task."""
        task = self._tasks.popleft()
        candidate = Candidate(task.recipe)
        staged = measure_in_stages(
            lambda items: self._evaluator.evaluate(candidate, task.split, items),
            task.early_stop_rule or NeverStop(()),
        )
        measured = staged.measurement
        return [Outcome(task.id, measured, None, rungs=staged.rungs, stopped=staged.stopped)]

    def close(self) -> None:
        """Drop queued tasks."""
        self._tasks.clear()
