"""The preset of LoraHub: NGOpt over one coefficient for each adapter, with a penalty on their size.

Huang 2023, "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" (arXiv
2307.13269): coefficients in [-1.5, 1.5] from 0, the loss on a few examples plus 0.05 times the mean
absolute coefficient, 40 evaluations. The box, the start and the granularity are the entry's
``preset``. What we change:

* The penalty is added to the combined loss in units of the anchors' range; the original adds it to
  a cross-entropy.
* The original reckons with one worker, for which NGOpt chooses COBYLA, which can have one
  suggestion outstanding only. Ours reckons with two, for which it chooses CMA-ES
  (:mod:`mergesearch.search.strategies.nevergrad`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field as Bound

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.nevergrad import CMA_LIMIT, Nevergrad


class LoraHub:
    """NGOpt on the loss plus ``penalty`` times the mean absolute coefficient.

    Args:
        problem: The box and how losses combine.
        seed: Seed of the strategy's generators.
        penalty: Loss, in units of the anchors' range, of coefficients that are 1 on average.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = True

    def __init__(
        self, problem: Problem, seed: int, *, penalty: Annotated[float, Bound(ge=0)] = 0.05
    ) -> None:
        check_dimension("lorahub", problem)
        self._problem = problem
        self._penalty = penalty
        anchors = tuple(self._penalised(anchor) for anchor in problem.anchors)
        single = replace(
            problem,
            objectives=1,
            scale=np.array([[0.0, 1.0]]),
            weights=np.array([1.0]),
            anchors=anchors,
        )
        self._ngopt = Nevergrad(single, seed, optimizer="NGOpt")

    def ask(self, count: int) -> list[Suggestion]:
        """NGOpt's suggestions."""
        return self._ngopt.ask(count)

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Tell the penalised losses."""
        self._ngopt.tell([self._penalised(trial) for trial in trials])

    def best(self) -> list[Point]:
        """NGOpt's recommendation."""
        return self._ngopt.best()

    def _penalised(self, trial: TrialResult) -> TrialResult:
        if trial.losses is None:
            return trial
        # loss + penalty · mean |w|
        size = float(np.mean(np.abs(trial.point)))
        loss = self._problem.scalarise(trial.losses) + self._penalty * size
        return replace(trial, losses=np.array([loss]))


def check_dimension(name: str, problem: Problem) -> None:
    """Refuse what NGOpt cannot search.

    Raises:
        InputError: If there are more dimensions than CMA-ES of nevergrad works in.
    """
    if problem.dim > CMA_LIMIT:
        raise InputError(
            f"strategy.name: expected at most {CMA_LIMIT} dimensions for {name}, received "
            f"{problem.dim}; "
            "choose space.granularity: task, or the strategy cma_es"
        )
