"""A sampler of Optuna by name, behind this project's contract.

Akiba 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework" (arXiv 1907.10902),
engine: optuna. What we add or change:

* No sampler begins uniformly over the box. The start is the first point; until enough trials have
  completed for the sampler's model or first population, the others are normal draws around it.
* Every setting that matters is given explicitly, so that a new default of Optuna changes nothing
  here.
* Anchors and results of others enter as completed trials, and for the genetic samplers as members
  of the current generation. Failed trials are told as failed, which every sampler passes over.
* ``tpe``, ``gp``, ``nsga2`` and ``nsga3`` take several objectives as they are, in units of the
  anchors' range; for the others they are combined by the problem's weights.
* Coordinates are scaled to the unit box. The study lives in memory; the record of a run is the
  trial log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field as Bound

from mergesearch.merging import InputError
from mergesearch.search.quiet import quiet_optuna
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.seeding import draw_near, key_of, known_merges
from mergesearch.search.strategies.parts.unit_box import UnitBox

if TYPE_CHECKING:
    import optuna

#: First step size of ``cma_es`` as a fraction of the range.
CMA_SIGMA = 0.15


@dataclass(frozen=True)
class Limits:
    """What a sampler can bear; the costs are CPU time of an ask, measured.

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


class OptunaSampler:
    """Asks a sampler of Optuna.

    Args:
        problem: The box and how losses combine.
        seed: Seed of the strategy's generator.
        sampler: ``tpe`` (multivariate Parzen estimators), ``gp`` (Gaussian process), ``nsga2``,
            ``nsga3``, ``cma_es``, ``qmc`` (scrambled Sobol points over the box) or ``random``
            (uniform over the box).
        startup: Completed trials near the start, anchors included, before the sampler takes over;
            the population of ``nsga2`` and ``nsga3``. Default 10 for ``tpe`` and ``gp``, 24 for the
            genetic ones, else 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = False

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        sampler: Literal["tpe", "gp", "nsga2", "nsga3", "cma_es", "qmc", "random"] = "tpe",
        startup: Annotated[int, Bound(ge=2)] | None = None,
    ) -> None:
        self._problem = problem
        self._box = UnitBox(problem)
        self._limits = LIMITS[sampler]
        self._rng = np.random.default_rng(seed)
        self._startup = startup or self._limits.startup
        self._names = [f"x{place:04d}" for place in range(self._box.dim)]
        self._outstanding: dict[int, tuple[int, Point]] = {}  # suggestion id -> trial number, point
        self._asked = self._completed = 0
        if self._box.dim:
            self._check(sampler)
            self._start_study(sampler)

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` points: the start, draws around it, then the sampler's."""
        suggestions = []
        for _ in range(count):
            suggestions.append(Suggestion(self._asked, self._next_point()))
            self._asked += 1
        return suggestions

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Tell whole results; failures as failed."""
        for trial in trials:
            if self._box.dim:
                with quiet_optuna():
                    self._tell(trial)

    def best(self) -> list[Point]:
        """Nothing beyond the best trials."""
        return []

    def _check(self, sampler: str) -> None:
        limits = self._limits
        problem = self._problem
        if self._box.dim > limits.most:
            raise InputError(
                f"strategy.sampler: expected at most {limits.most} dimensions for {sampler}, "
                f"received {self._box.dim} "
                f"({limits.reason}); choose the strategy "
                f"{'nsga2' if problem.objectives > 1 else 'cma_es'}"
            )
        if limits.budget is not None and problem.budget > limits.budget:
            raise InputError(
                f"strategy.sampler: expected a budget of at most {limits.budget} for {sampler}, "
                "received "
                f"{problem.budget} ({limits.reason}); choose sampler: tpe or the strategy quadratic"
            )

    def _start_study(self, sampler: str) -> None:
        import optuna

        problem = self._problem
        with quiet_optuna():
            self._study = optuna.create_study(
                storage=optuna.storages.InMemoryStorage(),
                sampler=self._build(sampler, int(self._rng.integers(2**31))),
                directions=["minimize"] * (problem.objectives if self._limits.several else 1),
            )
        unit: optuna.distributions.BaseDistribution = optuna.distributions.FloatDistribution(
            0.0, 1.0
        )
        self._distributions = dict.fromkeys(self._names, unit)
        known = known_merges(problem)
        self._start_is_known = any(
            key_of(anchor.point) == key_of(problem.start) for anchor in known
        )
        self.tell(known)

    def _build(self, sampler: str, seed: int) -> optuna.samplers.BaseSampler:
        """The sampler with explicit settings."""
        from optuna import samplers

        if sampler == "tpe":
            return samplers.TPESampler(
                n_startup_trials=self._startup,
                n_ei_candidates=24,
                multivariate=True,
                group=False,
                constant_liar=True,
                seed=seed,
            )
        if sampler == "gp":
            return samplers.GPSampler(
                n_startup_trials=self._startup, deterministic_objective=False, seed=seed
            )
        if sampler == "cma_es":
            return self._build_cma_es(seed)
        if sampler == "qmc":
            return samplers.QMCSampler(
                qmc_type="sobol", scramble=True, warn_independent_sampling=False, seed=seed
            )
        if sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return self._build_genetic(
            samplers.NSGAIISampler if sampler == "nsga2" else samplers.NSGAIIISampler, seed
        )

    def _build_genetic(self, kind: Any, seed: int) -> optuna.samplers.BaseSampler:
        from optuna.samplers import nsgaii

        sampler: optuna.samplers.BaseSampler = kind(
            population_size=self._startup,
            crossover=nsgaii.SBXCrossover(eta=15.0),
            crossover_prob=0.9,
            mutation=nsgaii.PolynomialMutation(eta=20.0),
            mutation_prob=1 / self._box.dim,
            seed=seed,
        )
        return sampler

    def _build_cma_es(self, seed: int) -> optuna.samplers.BaseSampler:
        from optuna.samplers import CmaEsSampler

        return CmaEsSampler(
            x0=self._named(self._box.to_unit(self._problem.start)),
            sigma0=CMA_SIGMA,
            n_startup_trials=self._startup,
            popsize=4 + int(3 * math.log(self._box.dim)),  # Hansen 2016, eq. 48
            warn_independent_sampling=False,
            seed=seed,
        )

    def _next_point(self) -> Point:
        problem = self._problem
        if not self._box.dim:
            return problem.start.copy()
        with quiet_optuna():
            if self._asked == 0 and not self._start_is_known:
                self._enqueue(problem.start)
            elif self._completed < self._startup:
                self._enqueue(draw_near(problem.start, problem, self._rng))
            trial = self._ask_study()
        params = trial.params  # a copy, every time
        point = self._box.to_point(np.array([params[name] for name in self._names]))
        self._outstanding[self._asked] = trial.number, point
        return point

    def _tell(self, trial: TrialResult) -> None:
        from optuna.trial import TrialState

        values = (
            None
            if trial.losses is None or trial.evaluated is not None
            else self._values(trial.losses)
        )
        number, asked = self._outstanding.pop(
            -1 if trial.id is None else trial.id, (None, trial.point)
        )
        same = number is not None and np.allclose(asked, trial.point, rtol=0, atol=1e-9)
        if number is not None:
            whole = same and values is not None
            self._study.tell(
                number, values if whole else None, TrialState.COMPLETE if whole else TrialState.FAIL
            )
        if values is not None:
            self._completed += 1
            if not same:
                self._add(trial.point, values)

    def _add(self, point: Point, values: list[float]) -> None:
        """A completed trial at a point that the sampler did not propose."""
        from optuna.trial import create_trial

        if self._limits.genetic:
            # Only what was asked belongs to a generation.
            self._enqueue(point)
            self._study.tell(self._ask_study(), values)
            return
        params = self._named(self._box.to_unit(point))
        self._study.add_trial(
            create_trial(params=params, distributions=self._distributions, values=values)
        )

    def _ask_study(self) -> optuna.Trial:
        trial = self._study.ask(self._distributions)
        if self._limits.genetic:
            trial.relative_params  # noqa: B018  # an enqueued trial enters its generation with this property only
        return trial

    def _enqueue(self, point: Point) -> None:
        """Make the next ask of the study return ``point``."""
        self._study.enqueue_trial(self._named(self._box.to_unit(point)))

    def _values(self, losses: Point) -> list[float]:
        several = self._limits.several and self._problem.objectives > 1
        return (
            self._problem.normalise(losses).tolist()
            if several
            else [self._problem.scalarise(losses)]
        )

    def _named(self, unit: Point) -> dict[str, Any]:
        return dict(zip(self._names, unit.tolist(), strict=True))
