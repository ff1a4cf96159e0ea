"""Optuna's samplers with explicit settings, and the limits of what each can handle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Problem

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

#: First step size of ``cma_es`` as a fraction of the range.
CMA_SIGMA = 0.15


@dataclass(frozen=True)
class Limits:
    """The problems that a sampler can handle; costs are the measured CPU time of an ask.

    Attributes:
        most: Dimensions above which it refuses.
        reason: Why.
        startup: Default number of trials near the start.
        several: Whether it takes several objectives as they are.
        genetic: Whether it learns from members of its generations only.
        budget: Trials above which it refuses; None: none.
    """

    most: int
    reason: str
    startup: int = 1
    several: bool = False
    genetic: bool = False
    budget: int | None = None


LIMITS = {
    "tpe": Limits(
        128,
        "an ask takes 0.2 s at 256 and the search did not improve on the start",
        10,
        several=True,
    ),
    "gp": Limits(
        32,
        "an ask takes 0.5 s at 32 after 300 trials, and 1 s at 8 after 500",
        10,
        several=True,
        budget=500,
    ),
    "nsga2": Limits(2000, "an ask takes 36 ms at 2,000", 24, several=True, genetic=True),
    "nsga3": Limits(2000, "an ask takes 36 ms at 2,000", 24, several=True, genetic=True),
    "cma_es": Limits(
        100, "cmaes draws again while a point lies outside the box: 1.7 s at 256 on its face"
    ),
    "qmc": Limits(1000, "an ask takes 40 ms at 1,000"),
    "random": Limits(2000, "an ask takes 40 ms at 2,000"),
}


def check_limits(name: str, problem: Problem, dim: int) -> None:
    """Refuse a problem that is too large for a sampler.

    Args:
        name: The sampler's, a key of ``LIMITS``.
        problem: The problem.
        dim: Number of its coordinates that are free.

    Raises:
        InputError: If there are too many dimensions or trials.
    """
    limits = LIMITS[name]
    if dim > limits.most:
        raise InputError(
            f"strategy.sampler: expected at most {limits.most} dimensions for {name}, received "
            f"{dim} ({limits.reason}); choose the strategy "
            f"{'nsga2' if problem.objectives > 1 else 'cma_es'}"
        )
    if limits.budget is not None and problem.budget > limits.budget:
        raise InputError(
            f"strategy.sampler: expected a budget of at most {limits.budget} for {name}, received "
            f"{problem.budget} ({limits.reason}); choose sampler: tpe or the strategy quadratic"
        )


def build_sampler(name: str, seed: int, startup: int, start: Mapping[str, float]) -> BaseSampler:
    """The sampler called ``name``.

    Args:
        name: A key of ``LIMITS``.
        seed: Of its generator.
        startup: Trials before its model takes over, or the population of a genetic sampler.
        start: Parameter -> value of the start in the unit box; its length is the dimension.
    """
    return _BUILDERS[name](seed, startup, start)


def _tpe(seed: int, startup: int, start: Mapping[str, float]) -> BaseSampler:
    from optuna.samplers import TPESampler

    return TPESampler(
        n_startup_trials=startup,
        n_ei_candidates=24,
        multivariate=True,
        group=False,
        constant_liar=True,
        seed=seed,
    )


def _gp(seed: int, startup: int, start: Mapping[str, float]) -> BaseSampler:
    from optuna.samplers import GPSampler

    return GPSampler(n_startup_trials=startup, deterministic_objective=False, seed=seed)


def _cma_es(seed: int, startup: int, start: Mapping[str, float]) -> BaseSampler:
    from optuna.samplers import CmaEsSampler

    return CmaEsSampler(
        x0=dict(start),
        sigma0=CMA_SIGMA,
        n_startup_trials=startup,
        popsize=4 + int(3 * math.log(len(start))),  # 4 + ⌊3 ln d⌋ (Hansen 2016, eq. 48)
        warn_independent_sampling=False,
        seed=seed,
    )


def _qmc(seed: int, startup: int, start: Mapping[str, float]) -> BaseSampler:
    from optuna.samplers import QMCSampler

    return QMCSampler(qmc_type="sobol", scramble=True, warn_independent_sampling=False, seed=seed)


def _random(seed: int, startup: int, start: Mapping[str, float]) -> BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def _nsga2(seed: int, startup: int, start: Mapping[str, float]) -> BaseSampler:
    from optuna.samplers import NSGAIISampler

    return _genetic(NSGAIISampler, seed, startup, len(start))


def _nsga3(seed: int, startup: int, start: Mapping[str, float]) -> BaseSampler:
    from optuna.samplers import NSGAIIISampler

    return _genetic(NSGAIIISampler, seed, startup, len(start))


def _genetic(kind: Any, seed: int, population: int, dim: int) -> BaseSampler:
    from optuna.samplers import nsgaii

    sampler: BaseSampler = kind(
        population_size=population,
        crossover=nsgaii.SBXCrossover(eta=15.0),
        crossover_prob=0.9,
        mutation=nsgaii.PolynomialMutation(eta=20.0),
        mutation_prob=1 / dim,
        seed=seed,
    )
    return sampler


_BUILDERS: dict[str, Callable[[int, int, Mapping[str, float]], BaseSampler]] = {
    "tpe": _tpe,
    "gp": _gp,
    "nsga2": _nsga2,
    "nsga3": _nsga3,
    "cma_es": _cma_es,
    "qmc": _qmc,
    "random": _random,
}
