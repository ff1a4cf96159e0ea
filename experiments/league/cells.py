"""The cells of the league: problems, budgets and workers, in three sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from experiments.league.problems import Setup


@dataclass(frozen=True)
class Cell:
    """What is played with several seeds.

    Attributes:
        setup: The problem; its seed is replaced by each match's.
        workers: Suggestions outstanding.
    """

    setup: Setup
    workers: int = 1

    @property
    def name(self) -> str:
        """As in results and tables."""
        setup = self.setup
        parts = [setup.family, setup.noise, f"d{setup.dim}", f"n{setup.budget}"]
        parts += [f"m{setup.objectives}"] * (setup.objectives > 1)
        parts += [f"w{self.workers}"] * (self.workers > 1)
        return "-".join(parts)

    def seeded(self, seed: int) -> Setup:
        """The problem of a seed."""
        return replace(self.setup, seed=seed)


@dataclass(frozen=True)
class Size:
    """A cut of the league.

    Attributes:
        cells: What is played.
        seeds: Of every cell.
        cpu_limit: CPU seconds that a contestant may think in a match.
    """

    cells: tuple[Cell, ...]
    seeds: int
    cpu_limit: float


def _cell(family: str, noise: str, dim: int, budget: int, more: int = 1, workers: int = 1) -> Cell:
    assert noise in ("items", "binomial")
    setup = Setup(family, dim, budget, more, "items" if noise == "items" else "binomial")
    return Cell(setup, workers)


_TINY = (
    _cell("merge", "items", 16, 120),
    _cell("quadratic", "binomial", 8, 60),
    _cell("merge", "items", 8, 120, 2),
)
_SMALL = (
    _cell("quadratic_easy", "items", 4, 60),
    _cell("merge", "items", 16, 300),
    _cell("quadratic", "binomial", 16, 300),
    _cell("perceptron", "items", 16, 300),
    _cell("merge", "items", 48, 300),
    _cell("merge", "items", 48, 300, workers=8),
    _cell("plateau", "binomial", 48, 300),
    _cell("perceptron", "items", 48, 300),
    _cell("merge_wide", "binomial", 48, 1000),
    _cell("perceptron", "items", 128, 1000),
    _cell("merge", "items", 8, 120, 2),
    _cell("merge", "items", 48, 300, 2),
    _cell("merge", "items", 48, 300, 4),
)
_FULL = (
    *(
        _cell(family, noise, dim, budget)
        for family in ("quadratic_easy", "quadratic", "quadratic_hard", "plateau", "merge")
        for noise in ("items", "binomial")
        for dim, budget in ((4, 60), (16, 300), (48, 300), (48, 1000), (128, 1000))
    ),
    *(
        _cell(family, "items", dim, budget)
        for family in ("perceptron", "merge_wide")
        for dim, budget in ((4, 60), (16, 300), (48, 300), (48, 1000), (128, 1000))
    ),
    *(
        _cell(family, "items", dim, budget)
        for family in ("merge", "perceptron")
        for dim, budget in ((128, 3000), (512, 1000), (512, 3000))
    ),
    *(
        _cell(family, "items", dim, budget, workers=8)
        for family in ("merge", "perceptron")
        for dim, budget in ((16, 300), (48, 1000))
    ),
    *(
        _cell(family, "items", dim, budget, objectives)
        for family in ("quadratic", "merge", "perceptron")
        for objectives in (2, 3, 4)
        for dim, budget in ((4, 60), (16, 300), (48, 1000))
    ),
)

SIZES: Mapping[str, Size] = {
    "tiny": Size(_TINY, 2, 2.0),
    "small": Size(_SMALL, 3, 10.0),
    "full": Size(_FULL, 5, 60.0),
}
