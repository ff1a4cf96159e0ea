"""Model Swarms: particles move towards the best points and away from the worst.

Feng 2024, "Model Swarms: Collaborative Search to Adapt LLM Experts via Swarm Intelligence" (arXiv
2410.11163). What we changed:

* A particle is a vector of coefficients, not a model. Known merges are particles; half of those
  that are missing are mixtures ``w a + (1 - w) b`` of two known merges, w in [0, 2] as in the
  paper; the others are draws around the start.
* Random numbers are drawn for each coordinate; with one for all of them the swarm would never leave
  the span of its particles.
* Particles are pushed from the worst point where one of them stands, not from the worst ever: that
  stays where it is while the swarm contracts, and its push then outweighs every pull.
* Particles take turns as results come in (:mod:`mergesearch.search.strategies.parts.swarm`), so the
  step shrinks with each particle's own moves. The search ends with the budget; the paper ends it
  after 10 iterations without progress. Several objectives are combined by the problem's weights.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Point, Problem
from mergesearch.search.strategies.parts.seeding import draw_near, known_merges, starting_points
from mergesearch.search.strategies.parts.swarm import Particle, Swarm

#: The step's length shrinks by this factor with every move of a particle, down to the floor.
STEP_FACTOR = 0.95
STEP_FLOOR = 0.1


class ModelSwarms(Swarm):
    """Asynchronous Model Swarms.

    Args:
        problem: The box, the anchors and how losses combine.
        seed: Seed of the strategy's generator.
        particles: Size of the swarm.
        inertia: Weight of a particle's last step.
        cognitive: Weight of a particle's own best point.
        social: Weight of the swarm's best point.
        repel: Weight of the push from the swarm's worst point.
        patience: A particle returns to its best point after so many results that were no better.
        sigma: Spread of the first draws as a fraction of the range; default 0.2, less above ten
            dimensions.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        particles: Annotated[int, Bound(ge=2)] = 20,
        inertia: Annotated[float, Bound(gt=0)] = 0.4,
        cognitive: Annotated[float, Bound(ge=0)] = 0.3,
        social: Annotated[float, Bound(ge=0)] = 0.3,
        repel: Annotated[float, Bound(ge=0)] = 0.3,
        patience: Annotated[int, Bound(ge=1)] = 5,
        sigma: Annotated[float, Bound(gt=0, le=1)] | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        known = known_merges(problem)[:particles]
        super().__init__(
            problem, rng, known, _first_particles(problem, rng, particles - len(known), sigma)
        )
        self._weights = np.array([[inertia], [cognitive], [social], [repel]])
        self._patience = patience
        # Sec. 2: the first velocity leads towards another particle.
        others = rng.integers(particles, size=particles)
        for particle, other in zip(self._particles, others, strict=True):
            particle.velocity = self._particles[int(other)].position - particle.position

    def _step(self, particle: Particle) -> None:
        """Move along a random mean of four pulls; after too many idle results, from the best point.

        v ← (r_v φ_v v + r_p φ_p (p − x) + r_g φ_g (g − x) − r_w φ_w (w − x)) / C, C the sum of the
        weights r φ, and x ← x + step · v.
        """
        if particle.idle >= self._patience:
            particle.position = particle.best
            particle.velocity = np.zeros(self._box.dim)
            particle.idle = 0
        position = particle.position
        worst = max(self._particles, key=lambda one: one.last_loss).last
        pulls = np.array(
            [particle.velocity, particle.best - position, self._lead - position, position - worst]
        )
        weights = self._rng.random((4, self._box.dim)) * self._weights
        particle.velocity = (weights * pulls).sum(axis=0) / weights.sum(axis=0)
        step = max(STEP_FACTOR**particle.moves, STEP_FLOOR)
        particle.position = np.clip(position + step * particle.velocity, 0.0, 1.0)


def _first_particles(
    problem: Problem, rng: np.random.Generator, count: int, sigma: float | None
) -> list[Point]:
    """The start, mixtures of two known merges, and draws around the start."""
    known = [anchor.point for anchor in known_merges(problem)]
    points = starting_points(problem)[:1] if len(known) < 2 else []
    while len(known) > 1 and len(points) < count // 2:
        one, other = rng.choice(len(known), 2, replace=False)
        mixed = known[other] + 2.0 * rng.random() * (known[one] - known[other])
        points.append(np.clip(mixed, problem.lower, problem.upper))
    return points[:count] + [
        draw_near(problem.start, problem, rng, sigma) for _ in range(count - len(points))
    ]
