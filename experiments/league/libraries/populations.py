"""Evolution strategies, differential evolution and genetic algorithms of other packages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from experiments.league.libraries.base import Array, Library, Task
from experiments.league.libraries.generations import Generations
from experiments.league.libraries.inverted import Inverted


def pycma(task: Task) -> Library:
    """CMA-ES of pycma (Hansen), with its mean as the recommendation."""
    import cma

    options = {
        "bounds": [0.0, 1.0],
        "seed": task.seed + 1,
        "verbose": -9,
        "verb_log": 0,
        "maxfevals": 10**9,
    }
    es = cma.CMAEvolutionStrategy(task.start, task.sigma, options)
    return Generations(
        es.ask,
        lambda points, losses: es.tell(points, [float(loss.mean()) for loss in losses]),
        lambda: np.asarray(es.result.xfavorite),
    )


def cmaes(task: Task, kind: str = "CMA", **options: Any) -> Library:
    """CMA-ES of the package cmaes (Nomura), or a relative of it."""
    import cmaes as package

    bounds = np.tile([0.0, 1.0], (task.dim, 1))
    es = getattr(package, kind)(
        mean=task.start, sigma=task.sigma, bounds=bounds, seed=task.seed, **options
    )

    def tell(points: list[Array], losses: list[Array]) -> None:
        es.tell([(p, float(loss.mean())) for p, loss in zip(points, losses, strict=True)])

    return Generations(
        lambda: [es.ask() for _ in range(es.population_size)],
        tell,
        lambda: np.clip(es._mean, 0.0, 1.0),
    )


def scipy_de(task: Task) -> Library:
    """Differential evolution of scipy, from a population around the start."""
    from scipy.optimize import differential_evolution

    size = max(8, min(15 * task.dim, task.budget // 10))

    def run(call: Any) -> Array:
        found = differential_evolution(
            call,
            [(0.0, 1.0)] * task.dim,
            init=task.draws(size),
            maxiter=10**6,
            tol=0.0,
            polish=False,
            rng=task.seed,
        )
        return np.asarray(found.x)

    return Inverted(run)


def pymoo(task: Task, module: str, kind: str, directions: bool = False) -> Library:
    """A genetic algorithm of pymoo, from a population around the start."""
    import importlib

    from pymoo.core.problem import Problem
    from pymoo.core.termination import NoTermination

    size = max(12, min(100, task.budget // 12))
    options: dict[str, Any] = {"pop_size": size, "sampling": task.draws(size)}
    if directions:
        options["ref_dirs"] = _directions(task.objectives, size, task.seed)
    algorithm = getattr(importlib.import_module(module), kind)(**options)
    box = Problem(n_var=task.dim, n_obj=task.objectives, xl=0.0, xu=1.0)
    algorithm.setup(box, termination=NoTermination(), seed=task.seed, verbose=False)
    asked: list[Any] = []

    def ask() -> list[Array]:
        asked[:] = [algorithm.ask()]
        return list(asked[0].get("X"))

    def tell(points: list[Array], losses: list[Array]) -> None:
        from pymoo.core.evaluator import Evaluator
        from pymoo.problems.static import StaticProblem

        Evaluator().eval(StaticProblem(box, F=np.array(losses)), asked[0])
        algorithm.tell(infills=asked[0])

    return Generations(ask, tell)


def _directions(objectives: int, size: int, seed: int) -> Array:
    """Das and Dennis' directions, at most as many as the population."""
    from pymoo.util.ref_dirs import get_reference_directions

    parts = 1
    while math.comb(parts + objectives, objectives - 1) <= size:
        parts += 1
    return np.asarray(
        get_reference_directions("das-dennis", objectives, n_partitions=parts, seed=seed)
    )
