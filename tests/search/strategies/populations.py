"""Problems and a loop for the tests of strategies that keep a population."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mergesearch.search.strategies.base import Problem, Strategy, TrialResult
from mergesearch.search.strategies.table import build_strategy, check_options

Function = Callable[[np.ndarray], np.ndarray]


def box(
    dim: int,
    objectives: int = 1,
    *,
    start: float = 0.3,
    anchors: tuple[TrialResult, ...] = (),
    budget=1000,
) -> Problem:
    """The unit box."""
    return Problem(
        np.zeros(dim),
        np.ones(dim),
        np.full(dim, start),
        objectives,
        budget,
        np.tile([0.0, 1.0], (objectives, 1)),
        np.full(objectives, 1 / objectives),
        anchors,
    )


def anchor(point: np.ndarray | list[float], function: Function) -> TrialResult:
    return TrialResult(None, np.array(point, dtype=float), function(np.array(point, dtype=float)))


def sphere(point: np.ndarray) -> np.ndarray:
    """Squared distance to 0.6 everywhere."""
    return np.array([np.sum((point - 0.6) ** 2)])


def make(name: str, problem: Problem, seed: int = 0, **options: object) -> Strategy:
    return build_strategy(name, check_options(name, options), problem, seed)


def run(
    strategy: Strategy, function: Function, trials: int, in_flight: int = 1, seed: int = 0
) -> np.ndarray:
    """Losses ``(trials, objectives)`` of an asynchronous run.

    Results come in a random order.
    """
    rng = np.random.default_rng(seed)
    outstanding = []
    losses = []
    for _ in range(trials):
        while len(outstanding) < in_flight:
            outstanding += strategy.ask(1)
        done = outstanding.pop(int(rng.integers(len(outstanding))))
        losses.append(function(done.point))
        strategy.tell([TrialResult(done.id, done.point, losses[-1])])
    return np.array(losses)


def asked(strategy: Strategy, function: Function, trials: int) -> np.ndarray:
    """Points ``(trials, dim)`` of a run one by one."""
    points = []
    for _ in range(trials):
        suggestion = strategy.ask(1)[0]
        points.append(suggestion.point)
        strategy.tell([TrialResult(suggestion.id, suggestion.point, function(suggestion.point))])
    return np.array(points)
