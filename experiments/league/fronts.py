"""True hypervolume of fronts by observed and by estimated losses, on problems of the league.

``python -m experiments.league.fronts --strategies nsga2 map --seeds 2``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from experiments.league.landscape import Array
from experiments.league.play import Player, build, play, scale_of
from experiments.league.problems import Arena, Noise, Setup, make_arena
from mergesearch.search.front import choose_leaders, nondominated
from mergesearch.search.front_estimate import estimated_around
from mergesearch.search.strategies.base import Point, Suggestion, TrialResult

#: Dimensions and evaluations.
CELLS = ((16, 300), (48, 500))
NOISES: tuple[Noise, ...] = ("binomial", "items")
LEADERS = 6
HEAD = (
    "| | claimed | true | estimated front: claimed | true | leaders: true | by the estimates "
    "| best leader: gap | by the estimates |\n|---|---|---|---|---|---|---|---|---|"
)


class Noted:
    """A player whose results are kept.

    Args:
        player: The player.
    """

    def __init__(self, player: Player) -> None:
        self._player = player
        self.results: list[TrialResult] = []

    def ask(self, count: int) -> list[Suggestion]:
        """As the player asks."""
        return self._player.ask(count)

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Keep the results, and pass them on."""
        self.results += trials
        self._player.tell(trials)

    def best(self) -> list[Point]:
        """As the player recommends."""
        return self._player.best()


def measure(strategy: str, setup: Setup) -> list[float]:
    """Claimed and true hypervolume of both fronts, those of the leaders, and their smallest gap."""
    arena = make_arena(setup)
    player = Noted(build(strategy, {}, arena.problem, setup.seed, gradients=False))
    play(arena, player, seed=setup.seed)
    told = [
        each
        for each in [*arena.problem.anchors, *player.results]
        if each.losses is not None and each.evaluated is None
    ]
    points = np.array([each.point for each in told])
    seen = np.array([each.losses for each in told])
    errors = np.array([each.errors for each in told])
    around = estimated_around(points, seen, errors, np.flatnonzero(nondominated(seen)))
    assert around is not None
    rows, estimates = around
    observed = _volumes(arena, points, seen)
    estimated = _volumes(arena, points[rows], estimates)
    pairs = zip(observed[2:], estimated[2:], strict=True)
    return [*observed[:2], *estimated[:2], *(each for pair in pairs for each in pair)]


def _volumes(arena: Arena, points: Array, losses: Array) -> list[float]:
    """Claimed and true volume of the front, true volume of leaders, and the best one's gap."""
    scale = scale_of(arena)
    front = np.flatnonzero(nondominated(losses))
    scalars = scale.scalarise(losses, arena.problem.weights)
    leaders = choose_leaders(losses, scalars, scale, LEADERS)
    front_losses = np.array([arena.true_losses(points[row]) for row in front])
    leader_losses = np.array([arena.true_losses(points[row]) for row in leaders])
    volumes = [scale.hypervolume(each) for each in (losses[front], front_losses, leader_losses)]
    gap = min(arena.gap(points[row]) for row in leaders)
    return [*volumes, gap]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare two choices of a front.")
    parser.add_argument("--strategies", nargs="+", default=["nsga2", "map", "sms_emoa"])
    parser.add_argument("--family", default="merge")
    parser.add_argument("--seeds", type=int, default=2)
    asked = parser.parse_args(arguments)
    print(HEAD, flush=True)
    for strategy in asked.strategies:
        for dim, budget in CELLS:
            for noise in NOISES:
                figures = [
                    measure(strategy, Setup(asked.family, dim, budget, 2, noise, seed=seed))
                    for seed in range(asked.seeds)
                ]
                cells = " | ".join(f"{mean:.3f}" for mean in np.mean(figures, axis=0))
                print(f"| `{strategy}` {dim} / {budget} {noise} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
