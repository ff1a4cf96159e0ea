"""EvoGM-style search: rounds of evolution whose best merges are directions of the next.

EvoGM 2026, "Evolutionary Generative Merging" (arXiv 2605.29295). A merge is
``origin + Σ λ_k direction_k`` with λ in [-1, 1]^K. This is not EvoGM itself: the paper's proposals
come from two networks, trained with a cycle loss to map losers to winners and back; ours are a
differential step from a loser towards a winner, and past it. What we changed besides:

* The origin is the best known merge (the start at first). It and the promoted merges (λ = 0 and
  one-hot) are members of a round's first population without being measured again.
* After the first round, half of the directions are fresh normal draws, as long as the promoted
  ones. With promoted merges alone the search never leaves their span: on a sphere in 10 dimensions
  it stops at a third of the first loss.
* One iteration per round where the paper has three: new directions sooner did better at equal
  budgets.
* Steady state: a proposal follows from the results that are in; a round ends when it has all of its
  own. Results from an earlier round, or from others, count as merges to promote. Merges are clipped
  to the box. Several objectives are combined by the problem's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.seeding import default_sigma, key_of, known_merges, loss_of
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.search.strategies.parts.unit_box import UnitBox

#: Share of a round's results that are winners.
WINNERS = 0.3
#: A step covers up to this many times the way from loser to winner.
REACH = 2.0
#: Share of the directions that are promoted merges, after the first round.
PROMOTED = 0.5


@dataclass(frozen=True, eq=False)
class Round:
    """Coordinates of a round: ``origin + λ @ directions``, shapes ``(dim,)`` and ``(K, dim)``."""

    number: int
    origin: Point
    directions: Point


class EvoGm:
    """Asynchronous EvoGM-style search.

    Args:
        problem: The box, the anchors and how losses combine.
        seed: Seed of the strategy's generator.
        directions: K, how many directions a round has; its first population is ``2 K``.
        iterations: Populations of a round after the first.
        sigma: Length of the first fresh directions, as the spread of a draw in fractions of the
            range; default 0.2, less above ten dimensions.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = False

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        directions: Annotated[int, Bound(ge=2, le=1000)] = 8,
        iterations: Annotated[int, Bound(ge=1)] = 1,
        sigma: Annotated[float, Bound(gt=0, le=1)] | None = None,
    ) -> None:
        self._problem = problem
        self._rng = np.random.default_rng(seed)
        self._box = UnitBox(problem)
        self._count = directions
        self._quota = 2 * directions * (1 + iterations)
        self._length = sigma or default_sigma(problem.dim)  # of fresh directions, per coordinate
        self._best: dict[bytes, tuple[float, Point]] = {}  # the K + 1 best merges of all rounds
        self._book = SuggestionBook[tuple[int, Point]]()  # tickets: number of the round, λ
        for anchor in known_merges(problem):
            self._archive(self._box.to_unit(anchor.point), loss_of(anchor, problem))
        self._start_round(0, directions)

    def ask(self, count: int) -> list[Suggestion]:
        """``count`` merges of the current round; the very first is an unknown start."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Collect results; start the next round when those of this one are in."""
        for trial in trials:
            loss = loss_of(trial, self._problem)
            if trial.evaluated is None:
                self._archive(self._box.to_unit(trial.point), loss)
            ticket = self._book.redeem(trial)
            if ticket is None:
                continue
            number, shares = ticket
            if number == self._round.number:
                self._results.append((loss, shares))
                self._due -= 1
            if not self._due:
                self._start_round(self._round.number + 1, round(PROMOTED * self._count))

    def best(self) -> list[Point]:
        """Nothing beyond the best trials."""
        return []

    def _suggest(self) -> Suggestion:
        shares = self._propose()
        self._round_asked += 1
        point = self._box.to_point(self._merge(shares))
        return self._book.issue(point, (self._round.number, shares))

    def _start_round(self, number: int, most: int) -> None:
        """Promote the best merges, up to ``most``, to directions, and draw the others."""
        ranked = sorted(self._best.values(), key=lambda merge: merge[0])
        origin = ranked[0][1] if ranked and number else self._box.to_unit(self._problem.start)
        here = [loss for loss, position in ranked if np.array_equal(position, origin)]
        promoted = [
            (loss, position) for loss, position in ranked if not np.array_equal(position, origin)
        ][:most]
        self._round = Round(
            number,
            origin,
            self._directions(np.array([position - origin for _, position in promoted])),
        )
        self._results = [(loss, np.zeros(self._count)) for loss in here]
        self._results += [
            (loss, row) for (loss, _), row in zip(promoted, np.eye(self._count), strict=False)
        ]
        self._round_asked = len(self._results)
        self._due = self._quota

    def _directions(self, promoted: Point) -> Point:
        """Directions ``(K, dim)``: ``promoted`` ``(P, dim)``, then draws of their length."""
        if promoted.size:
            self._length = float(np.sqrt(np.mean(promoted**2)))
        directions = self._length * self._rng.standard_normal((self._count, self._box.dim))
        directions[: len(promoted)] = promoted.reshape(len(promoted), self._box.dim)
        return directions

    def _propose(self) -> Point:
        """The next λ ``(K,)``: a uniform draw, or a step from a loser towards a winner.

        Uniform draws complete the first population of a round.
        """
        if not self._book.issued and key_of(self._round.origin) not in self._best:
            return np.zeros(self._count)
        losses = np.array([loss for loss, _ in self._results])
        winners = min(math.ceil(WINNERS * losses.size), int(np.isfinite(losses).sum()))
        if self._round_asked < 2 * self._count or not 0 < winners < losses.size:
            return self._rng.uniform(-1.0, 1.0, self._count)
        order = np.argsort(losses, kind="stable")
        winner = self._results[order[self._rng.integers(winners)]][1]
        loser = self._results[order[self._rng.integers(winners, losses.size)]][1]
        return step(loser, winner, self._rng)

    def _merge(self, shares: Point) -> Point:
        # origin + Σ_k λ_k direction_k
        merged: Point = np.clip(self._round.origin + shares @ self._round.directions, 0.0, 1.0)
        return merged

    def _archive(self, position: Point, loss: float) -> None:
        """Keep the K + 1 best merges, each position once; failures are never among them."""
        if not math.isfinite(loss):
            return
        self._best[key_of(position)] = loss, position
        if len(self._best) > self._count + 1:
            worst = max(self._best, key=lambda key: self._best[key][0])
            del self._best[worst]


def step(loser: Point, winner: Point, rng: np.random.Generator) -> Point:
    """A step from a loser towards a winner, and past it, by a random share of each λ ``(K,)``."""
    # λ = λ_loser + r (λ_winner − λ_loser), r uniform in [0, REACH] for each coordinate
    shares: Point = np.clip(
        loser + rng.uniform(0.0, REACH, loser.size) * (winner - loser), -1.0, 1.0
    )
    return shares
