"""Experiment 8, third part: a race within the population against a race with the leader.

``python -m experiments.e0008_population [--seeds 20]``

CMA-ES draws 14 merges a generation, and a race decides how many items each is evaluated on. With
the leader: until it is worse than the best merge so far, with confidence. Within the population
(Heidrich-Meisner and Igel 2009, "Hoeffding and Bernstein races for selecting policies in
evolutionary strategies"; here with normal intervals of paired differences): until it is known
whether it belongs to the better half. Here a generation is evaluated stage by stage, all its
members together, as that paper has it, which a study cannot do. Every search may evaluate as many
items as 56 merges in full have. Problems are those of :mod:`experiments.e0008_made_items`; compared
is the true gap of the distribution's mean at the end. Nothing is kept: it takes a minute of CPU.
The table goes into ``experiments/0008-racing/README.md``, between its two marks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiments.e0008_made_items import DIM, ITEMS, README
from experiments.item_problem import ItemProblem, anchors_of
from experiments.running import mean_and_half, write_between
from mergesearch.search.fidelity.rules import paired_difference, race_stages
from mergesearch.search.strategies.base import Problem, Suggestion, TrialResult
from mergesearch.search.strategies.cma_es import CmaEs

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.intp]

START = "<!-- populations: written by the command above -->"
STOP = "<!-- end of populations -->"

POPULATION = 14
PARENTS = 7
WHOLE = ITEMS["search"]
LEAST = 50
BUDGET = 56 * WHOLE

#: Losses of the generation's members ``(members, items)``, those of the leader ``(items,)``, and
#: the confidence -> number of items that each member is evaluated on ``(members,)``.
Rule = Callable[[Array, Array, float], Counts]


def in_full(losses: Array, leader: Array, confidence: float) -> Counts:
    """All items."""
    return np.full(len(losses), WHOLE)


def with_leader(losses: Array, leader: Array, confidence: float) -> Counts:
    """Until a member is worse than the leader, with confidence."""
    counts = in_full(losses, leader, confidence)
    for row, own in enumerate(losses):
        for stage in race_stages(WHOLE, LEAST):
            mean, error = _difference(own[:stage] - leader[:stage])
            if mean > confidence * error:
                counts[row] = stage
                break
    return counts


def within_population(losses: Array, leader: Array, confidence: float) -> Counts:
    """Until it is known whether a member belongs to the better half."""
    counts = np.zeros(len(losses), dtype=np.intp)
    undecided = list(range(len(losses)))
    for stage in (*race_stages(WHOLE, LEAST), WHOLE):
        counts[undecided] = stage
        undecided = [row for row in undecided if not _decided(row, losses, counts, confidence)]
    return counts


def _decided(row: int, losses: Array, counts: Counts, confidence: float) -> bool:
    """Whether enough others are better, or enough are worse, on the items that both have seen."""
    better = 0
    worse = 0
    for other in range(len(losses)):
        shared = min(counts[row], counts[other])
        if other != row and shared:
            mean, error = _difference(losses[row, :shared] - losses[other, :shared])
            better += mean > confidence * error
            worse += mean < -confidence * error
    return better >= PARENTS or worse >= len(losses) - PARENTS


def _difference(gaps: Array) -> tuple[float, float]:
    """Mean of paired differences ``(n,)``, and its error as that of all items."""
    count = len(gaps)
    mean, error = paired_difference(gaps, np.full(count, 1 / count))
    return mean, error * math.sqrt(1 - count / WHOLE)


#: Label -> rule and confidence.
ROWS: Mapping[str, tuple[Rule, float]] = {
    "full": (in_full, 0.0),
    "with the leader, confidence 1": (with_leader, 1.0),
    "with the leader, confidence 2": (with_leader, 2.0),
    "with the leader, confidence 3": (with_leader, 3.0),
    "within the population, confidence 0.5": (within_population, 0.5),
    "within the population, confidence 1": (within_population, 1.0),
    "within the population, confidence 2": (within_population, 2.0),
}


@dataclass(frozen=True)
class Figures:
    """What one search came to.

    Attributes:
        gap: True gap of the mean at the end.
        generations: Number of generations.
        share: Items of a member, as a share of all.
    """

    gap: float
    generations: int
    share: float


def search(seed: int, rule: Rule, confidence: float) -> Figures:
    """Search by generations until the budget is spent."""
    made = ItemProblem(DIM, seed, dict(ITEMS))
    order = np.random.default_rng(0).permutation(WHOLE)

    def losses_of(point: Array) -> Array:
        return np.asarray(1 - made.scores(point, "search")[0][order])

    anchors = anchors_of(made)
    known = [losses_of(anchor) for anchor in anchors]
    means = [losses.mean() for losses in known]
    best = int(np.argmin(means))
    leader = known[best]
    strategy = CmaEs(
        _problem(anchors[best], min(means), max(means)),
        seed,
        population=POPULATION,
        restarts=False,
        noise="off",
    )
    spent = 0
    generations = 0
    while spent < BUDGET:
        asked = strategy.ask(POPULATION)
        losses = np.array([losses_of(suggestion.point) for suggestion in asked])
        counts = rule(losses, leader, confidence)
        strategy.tell(
            [
                _result(suggestion, own[:count], leader)
                for suggestion, own, count in zip(asked, losses, counts, strict=True)
            ]
        )
        whole = losses[counts == WHOLE]
        leader = min([leader, *whole], key=lambda own: float(own.mean()))
        spent += int(counts.sum())
        generations += 1
    top, ours, start = (
        made.truth(point)[0] for point in (made.optima[0], strategy.best()[0], made.start)
    )
    share = spent / (generations * POPULATION * WHOLE)
    return Figures(float((top - ours) / (top - start)), generations, share)


def _problem(start: Array, low: float, high: float) -> Problem:
    """What the strategy is told: the unit box, and the range of the anchors' losses."""
    return Problem(
        np.zeros(DIM), np.ones(DIM), start, 1, BUDGET, np.array([[low, high]]), np.ones(1)
    )


def _result(suggestion: Suggestion, seen: Array, leader: Array) -> TrialResult:
    """A member's loss with its error, as a study tells it; estimated where items are missing."""
    count = len(seen)
    whole = leader.std() / math.sqrt(WHOLE)
    if count == WHOLE:
        loss = seen.mean()
        error = seen.std() / math.sqrt(WHOLE)
    else:
        gaps = seen - leader[:count]
        loss = leader.mean() + gaps.mean()
        error = math.hypot(whole, gaps.std(ddof=1) / math.sqrt(count))
    return TrialResult(
        suggestion.id,
        suggestion.point,
        np.array([loss]),
        estimated=None if count == WHOLE else count,
        errors=np.array([error]),
    )


def table(seeds: int) -> str:
    """Generations, share of items and true gaps of the means."""
    lines = ["| race | generations | items of a merge, % | true gap |", "|---|---|---|---|"]
    for label, (rule, confidence) in ROWS.items():
        figures = [search(seed, rule, confidence) for seed in range(seeds)]
        generations = np.mean([each.generations for each in figures])
        share = 100 * np.mean([each.share for each in figures])
        gap = mean_and_half([each.gap for each in figures], 3)
        lines.append(f"| {label} | {generations:.0f} | {share:.0f} | {gap} |")
    return "\n".join(lines)


def main() -> None:
    """Run all searches, and write the table."""
    parser = argparse.ArgumentParser(
        description="Compare a race within the population with a race against the leader."
    )
    parser.add_argument(
        "--seeds", type=int, default=20, help="seeds of every row (default: %(default)s)"
    )
    text = table(parser.parse_args().seeds)
    write_between(README, START, STOP, text)
    print(text)


if __name__ == "__main__":
    main()
