"""Walks along gradients as strategies: who is asked next, and what each walk learns.

A walk is sequential: it knows its next point only when its last trial is in. Where more is asked
than it can use, more walks begin beside it, with other batches and learning rates (the setting that
gradients are most sensitive to), so that no worker idles. The walk with the best measured merge is
the one that is recommended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.workers.gradient_steps import (
    Array,
    GradientSteps,
    OptimizerConfig,
    OptimizerState,
    init_state,
    mean_gradient,
    point_of,
    step,
)

#: Learning rates of walks beside the first, as multiples of its own; later ones begin again with
#: other batches.
RATES = (1.0, 3.0, 1.0 / 3.0, 10.0, 0.1)


@dataclass(frozen=True, eq=False)
class WalkStep:
    """What a walk wants to try.

    Attributes:
        point: ``(dim,)``.
        descent: What to do there.
        items: As of a suggestion.
        token: The walk's own, to know the result by.
        notes: As of a suggestion.
    """

    point: Point
    gradient_steps: GradientSteps
    items: int | None = None
    token: int = 0
    notes: Mapping[str, float] = field(default_factory=dict)


class Walk(Protocol):
    """One walk.

    Attributes:
        over: Whether it has arrived; no walk begins once one has.
    """

    over: bool

    def propose(self) -> WalkStep | None:
        """What to try next; None, and nothing changed, while it waits for results."""

    def learn(self, move: WalkStep, told: TrialResult) -> None:
        """The result of a move; ``told.gradient_result`` is None where it failed."""

    @property
    def point(self) -> Point:
        """Where it stands ``(dim,)``."""


class ParallelWalks:
    """Hands asks and results to walks; strategies that are walks and nothing else derive from it.

    Args:
        problem: The box, and how losses combine.
        make: Number of a walk, from 0 -> the walk.
        most: Walks at most; None: as many as are asked for at once.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    recommends: ClassVar[bool] = True

    def __init__(self, problem: Problem, make: Callable[[int], Walk], most: int | None) -> None:
        self._problem = problem
        self._make = make
        self._most = most
        self.walks: list[Walk] = []
        self._levels: list[float] = []  # measured at each walk's latest point
        self._asked: dict[int, tuple[int, WalkStep]] = {}
        self._count = 0

    def ask(self, count: int) -> list[Suggestion]:
        """The next moves of walks that do not wait, and of new ones."""
        found: list[Suggestion] = []
        while len(found) < count and (proposed := self._propose()) is not None:
            number, move = proposed
            self._asked[self._count] = number, move
            found.append(
                Suggestion(self._count, move.point, move.items, move.gradient_steps, move.notes)
            )
            self._count += 1
        return found

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Results go to the walk that asked; what others found is passed over."""
        for trial in trials:
            asked = None if trial.id is None else self._asked.pop(trial.id, None)
            if asked is None:
                continue
            number, move = asked
            if trial.losses is not None and trial.evaluated is None:
                self._levels[number] = self._problem.scalarise(trial.losses)
            self.walks[number].learn(move, trial)

    def leader(self) -> int | None:
        """The walk whose latest measured merge is best; None before the first."""
        return int(np.argmin(self._levels)) if np.any(np.isfinite(self._levels)) else None

    def best(self) -> list[Point]:
        """Where the leading walk stands."""
        leader = self.leader()
        return [] if leader is None else [self.walks[leader].point]

    def _propose(self) -> tuple[int, WalkStep] | None:
        for number, walk in enumerate(self.walks):
            move = walk.propose()
            if move is not None:
                return number, move
        if any(walk.over for walk in self.walks) or (
            self._most is not None and len(self.walks) >= self._most
        ):
            return None
        self.walks.append(self._make(len(self.walks)))
        self._levels.append(np.inf)
        move = self.walks[-1].propose()
        assert move is not None
        return len(self.walks) - 1, move


class GradientWalk:
    """Steps along the gradient, some in each trial.

    With shares, every step's batches are split among as many trials, whose gradients are averaged
    here; every ``steps``-th step is measured.

    Args:
        rule: How steps are made.
        start: Where it begins ``(dim,)``.
        steps: Steps in each trial, or between measurements.
        shares: Trials among which the batches of a step are split.
    """

    def __init__(self, rule: OptimizerConfig, start: Point, steps: int, shares: int = 1) -> None:
        self.rule = rule
        self._steps = steps
        self._shares = shares
        self.over = False
        self.state: OptimizerState = init_state(rule, start)
        self._point = start
        self._given = 0  # shares of the current step that are out
        self._gradients: dict[int, Array | None] = {}

    @property
    def point(self) -> Point:
        """Where it stands ``(dim,)``."""
        return self._point

    def propose(self) -> WalkStep | None:
        """The next trial from where it stands, or the next share of the current step."""
        share = self._given
        if share == self._shares:
            return None
        self._given += 1
        if self._shares == 1:
            return WalkStep(self._point, GradientSteps(self.rule, self.state, self._steps))
        batch = replace(self.rule.batch, share=share, shares=self._shares)
        measured = share == 0 and self.state.count % self._steps == 0
        gradient_steps = GradientSteps(replace(self.rule, batch=batch), self.state, 0)
        return WalkStep(self._point, gradient_steps, None if measured else 0, token=share)

    def learn(self, move: WalkStep, told: TrialResult) -> None:
        """Go where the trial's steps led, or step along the mean of the shares; after a failure,
        with half the rate.
        """
        found = told.gradient_result
        if self._shares > 1:
            self._gradients[move.token] = None if found is None else found.gradient
            if len(self._gradients) < self._shares:
                return
            parts = [self._gradients[share] for share in range(self._shares)]
            whole = [part for part in parts if part is not None]
            state = None
            if len(whole) == self._shares:
                state = step(self.rule, self.state, mean_gradient(whole), self._point)
        else:
            state = None if found is None else found.state
        self._given = 0
        self._gradients = {}
        if state is None:
            self.rule = replace(self.rule, learning_rate=self.rule.learning_rate / 2)
        else:
            self.state = state
            self._point = point_of(self.rule, state)


def varied(rule: OptimizerConfig, number: int) -> OptimizerConfig:
    """The rule of a walk by its number: the first as it is, others with batches and learning rates
    of their own.
    """
    factor = RATES[number % len(RATES)]
    batch = replace(rule.batch, seed=rule.batch.seed + number)
    return replace(rule, learning_rate=rule.learning_rate * factor, batch=batch)


def followed(problem: Problem, names: Sequence[str] | None, who: str) -> dict[str, float]:
    """Weights of the objectives that a walk follows, summing to 1, in the study's proportions.

    Args:
        problem: What can be followed, and the weights.
        names: Objectives to follow; None: all that have gradients.
        who: The strategy, for messages.

    Raises:
        InputError: If an objective has no gradient.
    """
    given = problem.differentiable
    odd = sorted(set(names or ()) - set(given))
    if odd:
        raise InputError(
            f"strategy.objectives: expected names among {list(given)}, which {who} can follow, got "
            f"{odd}"
        )
    weights = {
        n: float(w)
        for n, w in zip(problem.names, problem.weights, strict=True)
        if n in (names or given)
    }
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
