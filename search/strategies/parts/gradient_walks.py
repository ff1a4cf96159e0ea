"""Strategies that walk along gradients: whose turn it is, and what each walk learns.

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
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.workers.gradient_steps import (
    Array,
    GradientSteps,
    OptimizerConfig,
    OptimizerState,
    init_state,
    mean_gradient,
    optimizer_step,
    point_of,
)

#: Learning rates of walks beside the first, as multiples of its own; later ones begin again with
#: other batches.
RATES = (1.0, 3.0, 1.0 / 3.0, 10.0, 0.1)


@dataclass(frozen=True, eq=False)
class WalkStep:
    """A trial that a walk proposes.

    Attributes:
        point: Where ``(dim,)``.
        gradient_steps: Gradients to take there, and steps along them.
        items: As in a suggestion.
        token: A number by which the walk knows the result.
        notes: As in a suggestion.
    """

    point: Point
    gradient_steps: GradientSteps
    items: int | None = None
    token: int = 0
    notes: Mapping[str, float] = field(default_factory=dict)


class Walk(Protocol):
    """A sequence of trials, each of which begins where the one before has led.

    Attributes:
        over: Whether it has converged; no walk begins once one has.
    """

    over: bool

    def propose(self) -> WalkStep | None:
        """The next trial; None, without a change of state, while the walk waits for results."""

    def learn(self, step: WalkStep, result: TrialResult) -> None:
        """Learn from a result; its ``gradient_result`` is None where the steps failed."""

    @property
    def point(self) -> Point:
        """Where the walk stands ``(dim,)``."""


class ParallelWalks:
    """Passes asks and results on to walks; the base of strategies that are nothing but walks.

    Args:
        problem: The box, and how losses combine.
        make: Number of a walk, from 0 -> the walk.
        most: Walks at most; None: as many as are asked for at once.

    Attributes:
        walks: The walks, in the order in which they began.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    recommends: ClassVar[bool] = True

    def __init__(self, problem: Problem, make: Callable[[int], Walk], most: int | None) -> None:
        self._problem = problem
        self._make = make
        self._most = most
        self.walks: list[Walk] = []
        self._levels: list[float] = []  # measured at each walk's latest point
        # Tickets: number of the walk, and its step.
        self._book = SuggestionBook[tuple[int, WalkStep]]()

    def ask(self, count: int) -> list[Suggestion]:
        """The next steps of walks that do not wait, and of new ones."""
        suggestions: list[Suggestion] = []
        while len(suggestions) < count and (proposal := self._propose()) is not None:
            step = proposal[1]
            suggestions.append(
                self._book.issue(
                    step.point,
                    proposal,
                    items=step.items,
                    gradient_steps=step.gradient_steps,
                    notes=step.notes,
                )
            )
        return suggestions

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Pass each result on to the walk that asked; those of others are ignored."""
        for result in trials:
            ticket = self._book.redeem(result)
            if ticket is None:
                continue
            number, step = ticket
            if result.losses is not None and result.evaluated is None:
                self._levels[number] = self._problem.scalarise(result.losses)
            self.walks[number].learn(step, result)

    def leader(self) -> int | None:
        """The walk whose latest measured merge is best; None before the first."""
        return int(np.argmin(self._levels)) if np.any(np.isfinite(self._levels)) else None

    def best(self) -> list[Point]:
        """Where the leading walk stands."""
        leader = self.leader()
        return [] if leader is None else [self.walks[leader].point]

    def _propose(self) -> tuple[int, WalkStep] | None:
        for number, walk in enumerate(self.walks):
            step = walk.propose()
            if step is not None:
                return number, step
        if any(walk.over for walk in self.walks) or (
            self._most is not None and len(self.walks) >= self._most
        ):
            return None
        self.walks.append(self._make(len(self.walks)))
        self._levels.append(np.inf)
        first = self.walks[-1].propose()
        assert first is not None
        return len(self.walks) - 1, first


class GradientWalk:
    """Steps along the gradient, some in each trial.

    With shares, every step's batches are split among as many trials, whose gradients are averaged
    here; every ``steps``-th step is measured.

    Args:
        config: How steps are made.
        start: Where the walk begins ``(dim,)``.
        steps: Steps in each trial, or between measurements.
        shares: Trials among which the batches of a step are split.
    """

    def __init__(self, config: OptimizerConfig, start: Point, steps: int, shares: int = 1) -> None:
        self.config = config
        self._steps = steps
        self._shares = shares
        self.over = False
        self.state: OptimizerState = init_state(config, start)
        self._point = start
        self._given = 0  # shares of the current step that are out
        self._gradients: dict[int, Array | None] = {}

    @property
    def point(self) -> Point:
        """Where the walk stands ``(dim,)``."""
        return self._point

    def propose(self) -> WalkStep | None:
        """The next trial from the walk's point, or the next share of the current step."""
        share = self._given
        if share == self._shares:
            return None
        self._given += 1
        if self._shares == 1:
            return WalkStep(self._point, GradientSteps(self.config, self.state, self._steps))
        batch = replace(self.config.batch, share=share, shares=self._shares)
        measured = share == 0 and self.state.count % self._steps == 0
        gradient_steps = GradientSteps(replace(self.config, batch=batch), self.state, 0)
        return WalkStep(self._point, gradient_steps, None if measured else 0, token=share)

    def learn(self, step: WalkStep, result: TrialResult) -> None:
        """Go where the steps led, or step along the mean gradient of the shares.

        After a failure the walk stays, and its learning rate is halved.
        """
        gradient_result = result.gradient_result
        if self._shares > 1:
            self._gradients[step.token] = (
                None if gradient_result is None else gradient_result.gradient
            )
            if len(self._gradients) < self._shares:
                return
            parts = [self._gradients[share] for share in range(self._shares)]
            whole = [part for part in parts if part is not None]
            state = None
            if len(whole) == self._shares:
                mean = mean_gradient(whole)
                state = optimizer_step(self.config, self.state, mean, self._point)
        else:
            state = None if gradient_result is None else gradient_result.state
        self._given = 0
        self._gradients = {}
        if state is None:
            self.config = replace(self.config, learning_rate=self.config.learning_rate / 2)
        else:
            self.state = state
            self._point = point_of(self.config, state)


def varied(config: OptimizerConfig, number: int) -> OptimizerConfig:
    """The configuration of the walk with a number: other batches and, by turns, learning rates.

    That of walk 0 is ``config`` itself.
    """
    factor = RATES[number % len(RATES)]
    batch = replace(config.batch, seed=config.batch.seed + number)
    return replace(config, learning_rate=config.learning_rate * factor, batch=batch)


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
