"""PSO-Merging: particles move towards their own best points and the swarm's.

Zhang 2025, "PSO-Merging: Merging Models Based on Particle Swarm Optimization" (arXiv 2508.19839).
What we changed:

* A particle is a vector of coefficients, not a model. The paper's first particles are base, experts
  and sparsified experts; ours are the known merges (base, experts and more), their midpoints, and
  draws around the best: coefficients cannot sparsify.
* Random numbers are drawn for each coordinate, as in Kennedy 1995, "Particle swarm optimization";
  with one for all of them the swarm would never leave the span of its particles.
* A velocity that leads out of the box is set to zero at the face.
* Particles take turns as results come in (:mod:`mergesearch.search.strategies.parts.swarm`); there
  are no iterations. Several objectives are combined by the problem's weights.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Problem
from mergesearch.search.strategies.parts.seeding import first_points, known_merges
from mergesearch.search.strategies.parts.swarm import Particle, Swarm


class ParticleSwarm(Swarm):
    """Asynchronous particle swarm optimization.

    Args:
        problem: The box, the anchors and how losses combine.
        seed: Seed of the strategy's generator.
        particles: Size of the swarm.
        inertia: Share of the last step that is kept.
        cognitive: Pull of a particle's own best point.
        social: Pull of the swarm's best point.
        sigma: Spread of the first particles as a fraction of the range; default 0.2, less above ten
            dimensions.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        particles: Annotated[int, Bound(ge=2)] = 20,
        inertia: Annotated[float, Bound(ge=0, lt=1)] = 0.2,
        cognitive: Annotated[float, Bound(ge=0)] = 2.0,
        social: Annotated[float, Bound(ge=0)] = 2.0,
        sigma: Annotated[float, Bound(gt=0, le=1)] | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        known = known_merges(problem)[:particles]
        super().__init__(
            problem, rng, known, first_points(problem, rng, particles - len(known), sigma)
        )
        self._inertia = inertia
        self._cognitive = cognitive
        self._social = social

    def _step(self, particle: Particle) -> None:
        """Move by inertia and the pulls of the two best points.

        v ← w v + c_1 r_1 (p − x) + c_2 r_2 (g − x), x ← x + v.
        """
        own, swarm = self._rng.random((2, self._box.dim))
        velocity = self._inertia * particle.velocity
        velocity += self._cognitive * own * (particle.best - particle.position)
        velocity += self._social * swarm * (self._lead - particle.position)
        aim = particle.position + velocity
        particle.position = np.clip(aim, 0.0, 1.0)
        particle.velocity = np.where(particle.position == aim, velocity, 0.0)
