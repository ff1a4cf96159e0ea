"""Swarms that take turns: whose turn it is, and the best point of each particle.

A particle moves when it is asked for, and is ready again when its result is told: a swarm without
iterations. A loss that is an estimate from some of the items does not lead the swarm: its point is
asked once more, on all items. Where more suggestions are wanted than there are particles, one
moves on before its result is in. Known merges are particles from the start and need no measurement;
a result that nobody asked for can become the swarm's best point.

Positions are in the unit cube of the free coordinates. A failure is worse than any result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.seeding import key_of, loss_of
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.strategies.parts.unit_box import UnitBox


@dataclass(eq=False)
class Particle:
    """A particle: where it is, and the best and latest results it has had.

    Attributes:
        position, velocity: Where it is and its last step ``(dim,)``.
        best, loss: The best of its measured positions ``(dim,)`` and the loss there; infinite
            before any result.
        last, last_loss: Where its last result comes from ``(dim,)``, and the loss there; -inf
            before any result, so that a position that was not measured is never the worst.
        moves: Steps taken.
        idle: Results since the last one that was its best.
        fresh: Whether its first position is still to be asked.
    """

    position: Point
    velocity: Point
    best: Point
    loss: float
    last: Point
    last_loss: float
    fresh: bool
    moves: int = 0
    idle: int = 0


class Swarm:
    """Particles that take turns; a strategy overrides :meth:`_step`.

    Args:
        problem: The box, and how losses combine.
        rng: The strategy's generator.
        known: Particles that need no measurement.
        points: First positions of the other particles ``(dim,)``.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = False

    def __init__(
        self,
        problem: Problem,
        rng: np.random.Generator,
        known: Sequence[TrialResult],
        points: Sequence[Point],
    ) -> None:
        self._problem = problem
        self._rng = rng
        self._box = UnitBox(problem)
        # Those to be measured take the first turns: the others then know more of the swarm when
        # they move.
        self._particles = [self._particle(point, math.inf) for point in points]
        self._particles += [
            self._particle(anchor.point, loss_of(anchor, problem)) for anchor in known
        ]
        self._ready = deque(self._particles)
        self._book = SuggestionBook[Particle]()  # tickets: the particles that asked
        self._lead = self._box.to_unit(problem.start)
        self._lead_loss = math.inf
        self._doubtful: deque[Point] = deque()  # to be asked again on all items
        self._confirmed: set[bytes] = set()  # points that were
        for particle in self._particles:
            self._follow(particle.best, particle.loss)

    def _particle(self, point: Point, loss: float) -> Particle:
        position = self._box.to_unit(point)
        fresh = loss == math.inf
        return Particle(
            position=position,
            velocity=np.zeros(self._box.dim),
            best=position,
            loss=loss,
            last=position,
            last_loss=-math.inf if fresh else loss,
            fresh=fresh,
        )

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` positions, each after a step of the particle whose turn it is."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Update the best points; the particle that asked is ready for its next step."""
        for trial in trials:
            position = self._box.to_unit(trial.point)
            loss = loss_of(trial, self._problem)
            if trial.estimated is not None:
                self._doubt(trial.point, loss)
            elif trial.evaluated is None:
                self._follow(position, loss)
            particle = self._book.redeem(trial)
            if particle is not None:
                self._ready.append(particle)
                _learn(particle, position, loss)

    def best(self) -> list[Point]:
        """Nothing beyond the best trials."""
        return []

    def _doubt(self, point: Point, loss: float) -> None:
        """Ask a point again if its estimated loss would lead the swarm."""
        if loss < self._lead_loss and key_of(point) not in self._confirmed:
            self._confirmed.add(key_of(point))
            self._doubtful.append(point)

    def _suggest(self) -> Suggestion:
        if self._doubtful:
            return self._book.issue(self._doubtful.popleft())
        turn = self._book.issued % len(self._particles)
        particle = self._ready.popleft() if self._ready else self._particles[turn]
        if not particle.fresh:
            self._step(particle)
            particle.moves += 1
        particle.fresh = False
        return self._book.issue(self._box.to_point(particle.position), particle)

    def _follow(self, position: Point, loss: float) -> None:
        """Make a position the swarm's best if its loss is lower."""
        if loss < self._lead_loss:
            self._lead = position
            self._lead_loss = loss

    def _step(self, particle: Particle) -> None:
        """Give the particle a new velocity and position."""
        raise NotImplementedError


def _learn(particle: Particle, position: Point, loss: float) -> None:
    """Update a particle by its result."""
    particle.last = position
    particle.last_loss = loss
    particle.idle += 1
    if loss < particle.loss:
        particle.best = position
        particle.loss = loss
        particle.idle = 0
