"""Plays one contestant on one problem, as a study would run it.

``python -m experiments.league.play --strategy cma_es --family merge --dim 48 --budget 300``
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from experiments.league.landscape import Array
from experiments.league.problems import Arena, Setup, make_arena
from mergesearch.search.front import Normaliser, nondominated
from mergesearch.search.front_estimate import Rows, estimated_around
from mergesearch.search.strategies.auto import choose
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.table import AUTO, build_strategy, check_options
from mergesearch.search.workers.gradient_steps import GradientSteps, take_gradient_steps

#: A gradient step costs as much as three evaluations of its batch: forward, and twice that back.
GRADIENT_COST = 3


class Player(Protocol):
    """What the league asks of a contestant: the contract of strategies."""

    def ask(self, count: int) -> list[Suggestion]:
        """Up to ``count`` suggestions."""

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Learn from results."""

    def best(self) -> list[Point]:
        """Recommendations, best first; none where it has none."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a contestant did.

    Attributes:
        gap: Of the recommended point; of the best observed one where nothing is recommended.
        gap_observed: Of the point with the best observed score, anchors included.
        cpu_ms: CPU of an ask and a tell together, per evaluation, in milliseconds.
        asked: Number of suggestions that were measured.
        volume: With several objectives, true hypervolume of the observed front; a point with the
            ideal in every objective has 1.
        claimed: Hypervolume of the observed front by its observed losses.
        stopped: Why it ended before its budget; empty: it did not.
        estimated: True hypervolume of the front by estimated losses, as a study recommends it.
    """

    gap: float
    gap_observed: float
    cpu_ms: float
    asked: int
    volume: float
    claimed: float
    stopped: str = ""
    estimated: float = 0.0


@dataclass
class _Game:
    """What has happened so far."""

    arena: Arena
    player: Player
    total: int
    limit: float
    results: list[TrialResult] = field(default_factory=list)
    spent: int = 0
    cpu: float = 0.0

    @property
    def over(self) -> bool:
        """Whether nothing more may be asked."""
        return self.spent >= self.total or self.cpu > self.limit

    def ask(self) -> list[Suggestion]:
        """One suggestion, or none; its cost is spent."""
        if self.over:
            return []
        begun = _cpu(self.player)
        suggestions = self.player.ask(1)
        self.cpu += _cpu(self.player) - begun
        self.spent += sum(self._cost(suggestion) for suggestion in suggestions)
        return suggestions

    def finish(self, suggestion: Suggestion) -> None:
        """Measure a suggestion and tell its result."""
        result = self._measure(suggestion)
        self.results.append(result)
        begun = _cpu(self.player)
        self.player.tell([result])
        self.cpu += _cpu(self.player) - begun

    def _cost(self, suggestion: Suggestion) -> int:
        items = self.arena.problem.items if suggestion.items is None else suggestion.items
        steps = suggestion.gradient_steps
        if steps is None:
            return items
        return items + GRADIENT_COST * steps.batches * self.arena.batch_items(steps.config.batch)

    def _measure(self, suggestion: Suggestion) -> TrialResult:
        point = suggestion.point
        if suggestion.items == 0:
            result = TrialResult(None, point, None, evaluated=0)
        else:
            result = self.arena.measure(point, suggestion.id, suggestion.items)
        steps = suggestion.gradient_steps
        walked = None if steps is None else _walk(self.arena, steps, point)
        return replace(result, id=suggestion.id, gradient_result=walked)


def play(
    arena: Arena, player: Player, workers: int = 1, seed: int = 0, cpu_limit: float = np.inf
) -> Outcome:
    """Play until the budget is spent, with so many suggestions outstanding.

    Args:
        arena: The problem.
        player: The contestant.
        workers: Suggestions that are measured at once; results come in random order.
        seed: Of that order.
        cpu_limit: CPU seconds after which nothing more is asked.
    """
    rng = np.random.default_rng([seed, 3])
    problem = arena.problem
    game = _Game(arena, player, problem.budget * problem.items, cpu_limit)
    outstanding: list[Suggestion] = []
    while True:
        while len(outstanding) < workers and (asked := game.ask()):
            outstanding += asked
        if not outstanding:
            break
        game.finish(outstanding.pop(int(rng.integers(len(outstanding)))))
    return _outcome(game)


def build(
    name: str, options: dict[str, Any], problem: Problem, seed: int, gradients: bool = True
) -> Player:
    """A strategy of ours; ``auto`` is the one that a study would take.

    Args:
        name, options: As in a study file.
        problem: What is searched.
        seed: Of the strategy.
        gradients: Whether the smooth loss is offered.
    """
    problem = problem if gradients else replace(problem, differentiable=())
    if name == AUTO:
        offered = bool(problem.differentiable)
        name = choose(problem.dim, problem.objectives, problem.budget, gradients=offered)
    return build_strategy(name, check_options(name, options), problem, seed)


def scale_of(arena: Arena) -> Normaliser:
    """Maps the ideal to 0 and the worst anchor's true loss to 1, per objective."""
    anchors = np.array([arena.true_losses(anchor.point) for anchor in arena.problem.anchors])
    return Normaliser(arena.ideal, anchors.max(axis=0))


def _cpu(player: Player) -> float:
    """CPU seconds that a contestant has used; a library in a process of its own reports them."""
    reported = getattr(player, "cpu_seconds", None)
    return time.process_time() if reported is None else float(reported())


def _walk(arena: Arena, steps: GradientSteps, point: Array) -> Any:
    weights = dict(steps.config.weights)
    return take_gradient_steps(
        steps, point, lambda at, batch: arena.loss_and_gradient(at, batch, weights)
    )


def _outcome(game: _Game) -> Outcome:
    arena = game.arena
    problem = arena.problem
    whole = [
        result
        for result in [*problem.anchors, *game.results]
        if result.losses is not None and result.evaluated is None
    ]
    losses = np.array([result.losses for result in whole])
    scores = losses @ problem.weights
    observed = whole[int(np.argmin(scores))].point
    recommended = game.player.best()
    stopped = "CPU limit" if game.cpu > game.limit else ""
    several = problem.objectives > 1
    volume, claimed, estimated = _volumes(arena, whole, losses) if several else (0.0, 0.0, 0.0)
    return Outcome(
        arena.gap(recommended[0]) if recommended else arena.gap(observed),
        arena.gap(observed),
        1e3 * game.cpu / max(len(game.results), 1),
        len(game.results),
        volume,
        claimed,
        stopped,
        estimated,
    )


def _volumes(
    arena: Arena, whole: Sequence[TrialResult], losses: Array
) -> tuple[float, float, float]:
    """True and claimed hypervolume of the observed front, true one of the estimated front."""
    scale = scale_of(arena)
    most = float(np.prod(scale.reference))

    def true_volume(rows: Rows) -> float:
        true = np.array([arena.true_losses(whole[row].point) for row in rows.tolist()])
        return scale.hypervolume(true) / most

    front = np.flatnonzero(nondominated(losses))
    claimed = scale.hypervolume(losses[front]) / most
    return true_volume(front), claimed, true_volume(estimated_rows(whole, front))


def estimated_rows(whole: Sequence[TrialResult], front: Rows) -> Rows:
    """Rows of the front that a study recommends; the observed front where it has no estimates.

    Args:
        whole: Results on all items.
        front: Rows of the observed front.
    """
    losses = np.array([each.losses for each in whole])
    unknown = np.full(losses.shape[1], np.nan)
    errors = np.array([unknown if each.errors is None else each.errors for each in whole])
    points = np.array([each.point for each in whole])
    around = estimated_around(points, losses, errors, front)
    if around is None:
        return front
    rows, estimates = around
    return np.asarray(rows[nondominated(estimates)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Play one strategy on several seeds.")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--options", type=json.loads, default={}, help="as JSON")
    parser.add_argument("--family", default="merge")
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--budget", type=int, default=300)
    parser.add_argument("--objectives", type=int, default=1)
    parser.add_argument("--noise", choices=("items", "binomial"), default="items")
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--no-gradients", action="store_true", help="offer no smooth loss")
    asked = parser.parse_args(arguments)
    gaps = []
    for seed in range(asked.seeds):
        setup = Setup(
            asked.family, asked.dim, asked.budget, asked.objectives, asked.noise, asked.items, seed
        )
        arena = make_arena(setup)
        player = build(asked.strategy, asked.options, arena.problem, seed, not asked.no_gradients)
        outcome = play(arena, player, asked.workers, seed)
        gaps.append(max(outcome.gap, 1e-4))
        volumes = (
            f"  volume {outcome.volume:.3f} claimed {outcome.claimed:.3f} "
            f"estimated front {outcome.estimated:.3f}"
        )
        print(
            f"seed {seed}  gap {outcome.gap:.3f}  observed {outcome.gap_observed:.3f}  "
            f"{outcome.cpu_ms:.2f} ms  asked {outcome.asked}"
            + (volumes if asked.objectives > 1 else ""),
            flush=True,
        )
    print(f"geometric mean of the gaps {np.exp(np.mean(np.log(gaps))):.3f}")


if __name__ == "__main__":
    main()
