"""A small cut of the league: how near strategies come to the best, at equal evaluations.

``python -m experiments.bench.league``; the league itself is ``python -m experiments.league``.
"""

from __future__ import annotations

import json

import numpy as np

from experiments.league.cells import Cell
from experiments.league.play import build, play
from experiments.league.problems import Setup, make_arena

SEEDS = 3
ONE = ("auto", "cma_es", "quadratic", "pso", "sobol")
SEVERAL = ("auto", "map", "sms_emoa", "nsga2", "sobol")
CELLS = (
    (Cell(Setup("merge", 16, 300)), ONE),
    (Cell(Setup("quadratic", 16, 300, noise="binomial")), ONE),
    (Cell(Setup("merge", 48, 300), workers=8), ONE),
    (Cell(Setup("merge", 8, 200, objectives=2)), SEVERAL),
)


def measure(cell: Cell, name: str) -> float:
    """Geometric mean of the gaps; with several objectives, mean of the true volumes."""
    values = []
    for seed in range(SEEDS):
        arena = make_arena(cell.seeded(seed))
        player = build(name, {}, arena.problem, seed, gradients=False)
        outcome = play(arena, player, cell.workers, seed)
        several = cell.setup.objectives > 1
        values.append(outcome.volume if several else np.log(max(outcome.gap, 0.005)))
    mean = float(np.mean(values))
    return mean if cell.setup.objectives > 1 else float(np.exp(mean))


def main() -> None:
    """Print a line for each cell, then one line of JSON."""
    print(f"league, {SEEDS} seeds: gap of the recommendation, or true volume with two objectives")
    figures = {}
    for cell, names in CELLS:
        figures[cell.name] = row = {name: round(measure(cell, name), 3) for name in names}
        shown = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
        print(f"  {cell.name:<26} {shown}", flush=True)
    print(json.dumps({"league": figures}))


if __name__ == "__main__":
    main()
