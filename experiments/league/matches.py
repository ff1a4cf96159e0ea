"""One match: a contestant in a cell, with a seed."""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict, dataclass

from experiments.league.cells import Cell
from experiments.league.contestants import Contestant
from experiments.league.library_player import LibraryPlayer
from experiments.league.play import Player, build, play
from experiments.league.problems import make_arena
from experiments.league.results import Result
from mergesearch.search.strategies.base import Problem


@dataclass(frozen=True)
class Match:
    """Who plays what.

    Attributes:
        contestant, cell, seed: The match.
        cpu_limit: CPU seconds after which the contestant is asked nothing more.
    """

    contestant: Contestant
    cell: Cell
    seed: int
    cpu_limit: float

    @property
    def key(self) -> tuple[str, str, int]:
        """As of its result."""
        return self.contestant.name, self.cell.name, self.seed

    @property
    def title(self) -> str:
        """For progress."""
        return f"{self.contestant.name} in {self.cell.name}, seed {self.seed}"


def run_match(match: Match, commit: str) -> Result:
    """Play it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    arena = make_arena(match.cell.seeded(match.seed))
    player = _player(match.contestant, arena.problem, match.seed)
    outcome = play(arena, player, match.cell.workers, match.seed, match.cpu_limit)
    return Result(*match.key, **asdict(outcome), commit=commit)


def _player(contestant: Contestant, problem: Problem, seed: int) -> Player:
    if contestant.library:
        return LibraryPlayer(contestant.name, problem, seed)
    options = dict(contestant.options)
    return build(contestant.strategy, options, problem, seed, contestant.gradients)
