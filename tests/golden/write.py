"""``make golden``: record what each strategy recommends at a fixed seed and budget."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point
from mergesearch.search.strategies.table import STRATEGIES, build_strategy, check_options
from tests.contracts.problems import gradient_result, make_problem, result_at

FILE = Path(__file__).parent / "recommendations.csv"
DIMENSIONS = (4, 40)
#: Not recorded: which of two models predicts better is decided by the rounding of the linear
#: algebra at hand.
SENSITIVE = {("map", 40)}
TRIALS = 60
#: Results are told three at a time, out of order, one in nine failed: what a sweep does to a
#: strategy.
IN_FLIGHT = 3


def recommendation(name: str, dim: int) -> Point | None:
    """The strategy's best point on the problem of the contract; None if it refuses.

    The point is its own recommendation, or else the best that it tried.
    """
    problem = make_problem(name, dim, 2 if STRATEGIES[name].objectives == "several" else 1)
    try:
        strategy = build_strategy(name, check_options(name, {}), problem, seed=11)
    except InputError:
        return None
    best = problem.start
    best_loss = np.inf
    for _ in range(TRIALS // IN_FLIGHT):
        for suggestion in strategy.ask(IN_FLIGHT)[::-1]:
            result = result_at(
                suggestion.point, problem, suggestion.id, failed=suggestion.id % 9 == 4
            )
            if result.losses is not None:
                result = replace(result, gradient_result=gradient_result(suggestion, problem))
            strategy.tell([result])
            if result.losses is not None and problem.scalarise(result.losses) < best_loss:
                best = suggestion.point
                best_loss = problem.scalarise(result.losses)
    return (strategy.best() or [best])[0]


def rows() -> Iterator[tuple[str, int, list[float]]]:
    """Strategy, dimension, first coordinates of the recommendation and its mean."""
    for name in sorted(STRATEGIES):
        for dim in DIMENSIONS:
            point = recommendation(name, dim)
            if point is not None and (name, dim) not in SENSITIVE:
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
