"""``make golden``: record what each strategy recommends at a fixed seed and budget."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from search.strategies import STRATEGIES, build_strategy, check_options
from search.strategy import Point, Problem, Told

FILE = Path(__file__).parent / "recommendations.csv"
DIMENSIONS = (2, 12, 260)
TRIALS = 120
#: Results are told three at a time, out of order, one in nine failed: what a sweep does to a strategy.
IN_FLIGHT = 3


def recommendation(name: str, dim: int) -> Point:
    """The strategy's best point (its own, or the best it tried) on a fixed problem."""
    problem = Problem(
        lower=np.zeros(dim),
        upper=np.full(dim, 1.5),
        start=np.full(dim, 0.3),
        objectives=2,
        budget=TRIALS,
        scale=np.array([[0.0, 2.0], [0.0, 1.0]]),
        weights=np.array([0.25, 0.75]),
    )
    target = np.linspace(0.2, 0.9, dim)
    strategy = build_strategy(name, check_options(name, {}), problem, seed=11)
    best, best_loss = problem.start, np.inf
    for _ in range(TRIALS // IN_FLIGHT):
        batch = strategy.ask(IN_FLIGHT)[::-1]
        for suggestion in batch:
            losses = np.array([np.mean((suggestion.point - target) ** 2), np.mean(np.abs(suggestion.point - target))])
            failed = suggestion.id % 9 == 4
            strategy.tell([Told(suggestion.id, suggestion.point, None if failed else losses)])
            if not failed and problem.scalarise(losses) < best_loss:
                best, best_loss = suggestion.point, problem.scalarise(losses)
    return (strategy.best() or [best])[0]


def rows() -> Iterator[tuple[str, int, list[float]]]:
    """Strategy, dimension, first coordinates of the recommendation and its mean."""
    for name in sorted(STRATEGIES):
        for dim in DIMENSIONS:
            point = recommendation(name, dim)
            yield name, dim, [*point[:3], float(point.mean())]


def main() -> None:
    """Write the file."""
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["strategy", "dim", "first coordinates and mean"])
        for name, dim, figures in rows():
            writer.writerow([name, dim, *(f"{figure:.9g}" for figure in figures)])


if __name__ == "__main__":
    main()
