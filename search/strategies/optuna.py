"""Samplers of Optuna by name, behind the contract of strategies.

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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field as Bound

from mergesearch.search.quiet import quiet_optuna
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.optuna_samplers import (
    LIMITS,
    build_sampler,
    check_limits,
)
from mergesearch.search.strategies.parts.seeding import draw_near, key_of, known_merges
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.strategies.parts.unit_box import UnitBox

if TYPE_CHECKING:
    import optuna


class OptunaSampler:
    """A strategy that asks a sampler of Optuna.

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
        self._names = [f"x{index:04d}" for index in range(self._box.dim)]
        # Tickets: number of Optuna's trial, and its point.
        self._book = SuggestionBook[tuple[int, Point]]()
        self._completed = 0
        if self._box.dim:
            check_limits(sampler, problem, self._box.dim)
            self._start_study(sampler)

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` points: the start, draws around it, then the sampler's."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Tell whole results as completed trials, and all others as failed."""
        for trial in trials:
            if self._box.dim:
                with quiet_optuna():
                    self._tell(trial)

    def best(self) -> list[Point]:
        """Nothing beyond the best trials."""
        return []

    def _start_study(self, sampler: str) -> None:
        import optuna

        problem = self._problem
        seed = int(self._rng.integers(2**31))
        start = self._named(self._box.to_unit(problem.start))
        with quiet_optuna():
            self._study = optuna.create_study(
                storage=optuna.storages.InMemoryStorage(),
                sampler=build_sampler(sampler, seed, self._startup, start),
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

    def _suggest(self) -> Suggestion:
        problem = self._problem
        if not self._box.dim:
            return self._book.issue(problem.start.copy())
        with quiet_optuna():
            if self._book.issued == 0 and not self._start_is_known:
                self._enqueue(problem.start)
            elif self._completed < self._startup:
                self._enqueue(draw_near(problem.start, problem, self._rng))
            trial = self._ask_study()
        params = trial.params  # a copy, every time
        point = self._box.to_point(np.array([params[name] for name in self._names]))
        return self._book.issue(point, (trial.number, point))

    def _tell(self, trial: TrialResult) -> None:
        from optuna.trial import TrialState

        values = None
        if trial.losses is not None and trial.evaluated is None:
            values = self._values(trial.losses)
        number, asked = self._book.redeem(trial) or (None, trial.point)
        same = number is not None and np.allclose(asked, trial.point, rtol=0, atol=1e-9)
        if number is not None:
            whole = same and values is not None
            state = TrialState.COMPLETE if whole else TrialState.FAIL
            self._study.tell(number, values if whole else None, state)
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
            # An enqueued trial enters its generation only when this property is read.
            trial.relative_params  # noqa: B018
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
