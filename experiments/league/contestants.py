"""Who plays: every strategy of ours whose points fit a plain box, and the libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.league.problems import Setup
from mergesearch.search.strategies.auto import choose
from mergesearch.search.strategies.table import AUTO, STRATEGIES, StrategyInfo

#: Strategies of ours that do not play, and why.
LEFT_OUT: Mapping[str, str] = {
    "m2n2": "searches segments of weights, which a box of coefficients does not have",
    "medsamix": "searches methods for layer groups, which a box does not have",
    "expert_merging": "needs the space of a study",
    "expert_merging_pp": "needs the space of a study",
    "lorahub": "NGOpt with bounds of its own; NGOpt itself plays",
    "pcb_es": "NGOpt with bounds of its own; NGOpt itself plays",
    "nested_map": "ends in one compromise, for a coefficient per expert",
}


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        name: As in the table.
        library: Whether it is another package; else a strategy of ours.
        objectives: ``one``, ``several`` or ``any``.
        strategy, options: For ours.
        gradients: Whether it uses gradients of a smooth loss, which others have not.
        slow: Whether it thinks for minutes in a match; ``--cheap`` leaves it out.
        most_dim, most_budget: Where it does not play, because it refuses or takes hours.
    """

    name: str
    library: bool
    objectives: str = "one"
    strategy: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    gradients: bool = False
    slow: bool = False
    most_dim: int = 10_000
    most_budget: int = 10_000

    def plays(self, setup: Setup) -> bool:
        """Whether it plays on such a problem."""
        fits = self.objectives == "any" or (self.objectives == "one") == (setup.objectives == 1)
        small = setup.dim <= self.most_dim and setup.budget <= self.most_budget
        return fits and small and (self.strategy != "evo_merging" or setup.dim % 2 == 0)

    def code(self, setup: Setup) -> str:
        """What searches a problem: the strategy that ``auto`` stands for, else the contestant.

        Two contestants with the same code in a cell are twins, and no rivals.
        """
        if self.strategy != AUTO:
            return self.name
        return choose(setup.dim, setup.objectives, setup.budget, gradients=self.gradients)


def contestants() -> tuple[Contestant, ...]:
    """All of them: ``auto``, our strategies as the table has them today, and the libraries."""
    ours = [_ours(entry) for entry in STRATEGIES.values() if entry.name not in LEFT_OUT]
    automatic = (
        Contestant("auto", False, "any", AUTO),
        Contestant("auto, gradients", False, "any", AUTO, gradients=True),
    )
    return (*automatic, *ours, *_LIBRARIES)


def _ours(entry: StrategyInfo) -> Contestant:
    return Contestant(
        entry.name,
        False,
        entry.objectives,
        entry.name,
        gradients=bool(entry.load().needs & {"gradient", "proxy"}),
        # Slow ones are stopped by the CPU limit; what refuses a dimension does not play there.
        most_dim=entry.most or (299 if entry.name == "nevergrad" else 10_000),
    )


def _library(name: str, objectives: str = "one", **limits: Any) -> Contestant:
    return Contestant(name, True, objectives, **limits)


_LIBRARIES = (
    _library("pycma"),
    _library("cmaes"),
    _library("cmaes separable"),
    _library("cmaes lr-adapt"),
    _library("nevergrad NGOpt", most_dim=299),
    _library("Optuna TPE", "any"),
    _library("Optuna GP", "any", slow=True, most_dim=64, most_budget=300),
    _library("Optuna CMA"),
    _library("SMAC3", slow=True, most_dim=128, most_budget=300),
    _library("BoTorch TuRBO", slow=True, most_dim=128, most_budget=300),
    _library("Py-BOBYQA", most_dim=128),
    _library("scipy DE"),
    _library("BoTorch qNEHVI", "several", slow=True, most_dim=64, most_budget=300),
    _library("pymoo NSGA-II", "several"),
    _library("pymoo NSGA-III", "several"),
    _library("pymoo AGE-MOEA2", "several"),
    _library("pymoo SMS-EMOA", "several"),
)
