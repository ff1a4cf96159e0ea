"""M2N2: an archive of merges that compete for items; children join two of them at a split point.

Abrantes 2025, "Competition and Attraction Improve Model Fusion" (arXiv 2508.16204, GECCO). Items
are resources: what an item gives is shared by all members that solve it, so that members differ
(competition); a mate is drawn for what it adds to the first parent (attraction); a child takes one
side of both parents' weights up to a random position of the flat index, and the other side from
there on. One trial is one step, there are no generations. What we changed:

* Members are fields (a few kB), not models. A member is at each position a weighted sum of the
  directions, and so is a child (:mod:`mergesearch.search.strategies.parts.field_crossover`); its
  arc is seen from the base, and equals the authors', which is seen from the origin, where the base
  is zero. Coefficients are clipped into the box of the space. A child with more segments than the
  space holds has neighbours joined that change the merge least; the authors' have no such limit.
* The archive starts empty rather than with rows of zeros, which would be the first to go.
* Seeds are the known merges, experts first, then what is missing of the start and of each direction
  alone.
* A mate is another member: without attraction the authors draw the first parent again now and then,
  for a child that is its copy. Where no mate adds anything (the sum that is not a number in the
  authors' code), fitness decides.
* Items of several objectives share the capacity of their objective, by its weight.
* The member with the best mean score may lose the competition; it is kept apart and recommended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field as Bound

from mergesearch.merging import Field, InputError
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.field_crossover import Crossed, cross, limit
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook
from mergesearch.spaces import SegmentSpace

Floats = npt.NDArray[np.float64]


class M2n2:
    """M2N2 over fields of segments.

    Args:
        problem: The box, its space of segments, and how scores combine.
        seed: Seed of the strategy's generator.
        archive: Number of members P.
        alpha: How strongly members compete for items: 0 not at all, 1 shares every item out.
        attraction: Draw mates for what they add; else by their fitness.
        split: Join parents at a split point; else the child lies on the arc between them as a
            whole.
        mutation: Standard deviation of noise on every coefficient of a child; 0 for trained models.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"items"})
    recommends: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        archive: Annotated[int, Bound(ge=2)] = 20,
        alpha: Annotated[float, Bound(ge=0)] = 1.0,
        attraction: bool = True,
        split: bool = True,
        mutation: Annotated[float, Bound(ge=0)] = 0.0,
    ) -> None:
        self._space = _segments_of(problem)
        self._rng = np.random.default_rng(seed)
        self._attraction = attraction
        self._split = split
        self._mutation = mutation
        bounds = problem.lower, problem.upper
        self._low, self._high = (
            side[self._space.segments - 1 :].reshape(-1, self._space.segments) for side in bounds
        )
        self._scoring = Scoring(problem)
        self.archive = Archive(archive, alpha)
        self._elite: tuple[float, Point] | None = None
        self._book = SuggestionBook[None]()
        measured = [anchor for anchor in problem.anchors if self._scoring.covers(anchor)]
        self._scoring.settle(measured)
        self.tell(sorted(measured, key=lambda anchor: not self._is_expert(anchor.point)))
        self._seeds = deque(self._missing_seeds(problem, measured))

    def ask(self, count: int) -> list[Suggestion]:
        """Seeds first, then children of the archive as it is now."""
        return [self._book.issue(self._propose()) for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Let whole results compete as members; failures and partial results do not enter."""
        for trial in trials:
            scores = self._scoring.of(trial)
            if scores is None:
                continue
            self.archive.add(self._space.field(trial.point), scores, self._scoring.capacity)
            mean = float((self._scoring.capacity * scores).sum())
            if self._elite is None or mean > self._elite[0]:
                self._elite = mean, trial.point.copy()

    def best(self) -> list[Point]:
        """The point with the best mean score over the items of all objectives."""
        return [] if self._elite is None else [self._elite[1].copy()]

    def _propose(self) -> Point:
        if self._seeds:
            return self._seeds.popleft()
        return self._encode(self._child() if len(self.archive.fields) > 1 else self._mixture())

    def _child(self) -> Field:
        """A child of two members, within the box and the limit of segments."""
        first, second = self.archive.draw_parents(self._rng, self._attraction)
        size = self._space.layout.size
        split = int(self._rng.integers(size)) if self._split else size
        assert self._space.gram is not None
        crossed = cross(first, second, self._space.gram, self._rng.random(), split)
        values = crossed.field.values
        if self._mutation:
            values = values + self._mutation * self._rng.standard_normal(values.shape)
        inside = self._inside(Field(crossed.field.boundaries, values))
        if inside.compact().segments <= self._space.segments:
            return inside
        return limit(Crossed(inside, crossed.mass), self._space.segments)

    def _mixture(self) -> Field:
        """A random share of every direction and of the base, while there are no two members."""
        shares = self._rng.dirichlet(np.ones(self._space.directions + 1))[1:]
        return self._inside(Field.constant(self._space.layout.size, shares))

    def _inside(self, field: Field) -> Field:
        return Field(field.boundaries, np.clip(field.values, self._low[:, :1], self._high[:, :1]))

    def _missing_seeds(self, problem: Problem, measured: Sequence[TrialResult]) -> list[Point]:
        """The start and each single direction, without those that have been measured."""
        size = self._space.layout.size
        known = {self._key(anchor.point) for anchor in measured}
        alone = [self._inside(Field.constant(size, row)) for row in np.eye(self._space.directions)]
        seeds = {
            self._key(point): point
            for point in (problem.start, *map(self._space.encode, alone))
            if point is not None
        }
        return [point for key, point in seeds.items() if key not in known]

    def _encode(self, field: Field) -> Point:
        point = self._space.encode(field)
        assert point is not None  # fields of this strategy have no more segments than the space
        return point

    def _is_expert(self, point: Point) -> bool:
        """Whether a point is a single direction with coefficient 1 everywhere."""
        values = self._space.field(point).values
        return values.shape[1] == 1 and np.count_nonzero(values) == 1 and bool(values.max() == 1.0)

    def _key(self, point: Point) -> Field:
        return self._space.field(point)


class Archive:
    """Members that compete for items.

    Args:
        size: Number of members P.
        alpha: How strongly they compete.

    Attributes:
        fields: The members, in the order in which they came.
        scores: ``(members, items)``, from 0 to 1.
    """

    def __init__(self, size: int, alpha: float) -> None:
        self._size = size
        self._alpha = alpha
        self.fields: list[Field] = []
        self.scores: Floats = np.empty((0, 0))
        self._shares: Floats = np.empty((0, 0))

    def add(self, field: Field, scores: Floats, capacity: Floats) -> None:
        """Let a member compete; the one with the least fitness then leaves.

        A copy of a member does not enter.

        Args:
            field: The new member.
            scores: Its scores ``(items,)``.
            capacity: What each item gives ``(items,)``.
        """
        if field in self.fields:
            return
        self.fields.append(field)
        self.scores = np.vstack([self.scores.reshape(-1, scores.size), scores])
        if len(self.fields) > self._size:
            worst = int(shares(self.scores, capacity, self._alpha).sum(axis=1).argmin())
            del self.fields[worst]
            self.scores = np.delete(self.scores, worst, axis=0)
        self._shares = shares(self.scores, capacity, self._alpha)

    def draw_parents(self, rng: np.random.Generator, attraction: bool) -> tuple[Field, Field]:
        """A member drawn by its fitness, and another drawn for what it adds to the first."""
        fitness = self._shares.sum(axis=1)
        first = draw(rng, fitness)
        others = np.arange(len(self.fields)) != first
        weights = attraction_to(self._shares, first) if attraction else fitness * others
        if not weights.any():
            weights = fitness * others if (fitness * others).any() else others.astype(np.float64)
        return self.fields[first], self.fields[draw(rng, weights)]


def shares(scores: Floats, capacity: Floats, alpha: float) -> Floats:
    """What each member gets of each item ``(members, items)``: the paper's competition.

    s c / z with z = (Σ s)^α, the sum over members, and z = 1 where that is 0.

    Args:
        scores: ``(members, items)``, not negative.
        capacity: What each item gives ``(items,)``.
        alpha: How strongly members compete.
    """
    total = scores.sum(axis=0)
    # An item that nobody solves gives nothing, rather than 0/0.
    divisor = np.where(total > 0, total, 1.0)
    if alpha not in (0.0, 1.0):
        divisor = divisor**alpha
    return scores * (capacity / divisor if alpha else capacity)


def attraction_to(shared: Floats, first: int) -> Floats:
    """The paper's attraction of each member to ``first`` ``(members,)``.

    g_p = Σ_j max(0, share_pj − share_1j), over the items j.

    Args:
        shared: As :func:`shares` gives them.
        first: The first parent.
    """
    gain: Floats = np.maximum(shared - shared[first], 0.0).sum(axis=1)
    return gain


def draw(rng: np.random.Generator, weights: Floats) -> int:
    """An index drawn in proportion to the weights; any index where all are 0."""
    edges = np.cumsum(weights if weights.any() else np.ones_like(weights))
    return min(int(np.searchsorted(edges, rng.random() * edges[-1], side="right")), len(edges) - 1)


class Scoring:
    """Turns the items of a trial into scores from 0 to 1, where 1 is best.

    Where the items of an objective lie in [0, 1] on every anchor, a score is the value itself, or
    what it lacks to 1 where it is minimised. Otherwise, with u the loss in units of the anchors'
    range (0 best, 1 worst anchor) and v = 2u − 1, it is (1 − v / (1 + |v|)) / 2: 3/4 at the best
    anchor's mean, 1/4 at the worst's, and never 0 or 1. An objective without items counts as one
    item.

    Attributes:
        capacity: What each item gives ``(items,)``: its objective's weight over the objective's
            number of items.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._signs = np.ones(problem.objectives) if problem.signs is None else problem.signs
        self._sizes: list[int] = []
        self._plain: list[bool] = []
        self.capacity: Floats = np.empty(0)

    def covers(self, trial: TrialResult) -> bool:
        """Whether a trial was measured whole and has scores of items."""
        named = any(name in trial.items for name in self._problem.names)
        return trial.losses is not None and trial.evaluated is None and named

    def settle(self, trials: Sequence[TrialResult]) -> None:
        """Fix the numbers of items, and how to score them, by the first trials."""
        if not trials:
            return
        columns = [self._columns(trial) for trial in trials]
        self._sizes = [column.size for column in columns[0]]
        self._plain = [
            all(_is_share(column[index]) for column in columns) for index in range(len(self._sizes))
        ]
        # c_j = w_i / N_i for the N_i items j of objective i
        weights = self._problem.weights / np.array(self._sizes)
        self.capacity = np.repeat(weights, self._sizes)

    def of(self, trial: TrialResult) -> Floats | None:
        """Scores of the items of all objectives ``(items,)``; None where the trial lacks them."""
        if not self.covers(trial):
            return None
        if not self._sizes:
            self.settle([trial])
        columns = self._columns(trial)
        if [column.size for column in columns] != self._sizes:
            return None
        scores = np.concatenate(
            [self._score(index, column) for index, column in enumerate(columns)]
        )
        return np.where(np.isnan(scores), 0.0, scores)  # an item without an answer is not solved

    def _columns(self, trial: TrialResult) -> list[Floats]:
        """Items of each objective, in the user's direction."""
        assert trial.losses is not None
        own = zip(self._problem.names, self._signs * trial.losses, strict=True)
        return [
            np.asarray(trial.items.get(name, [value]), np.float64).ravel() for name, value in own
        ]

    def _score(self, index: int, values: Floats) -> Floats:
        sign = self._signs[index]
        (low, high) = self._problem.scale[index]
        if self._plain[index]:
            inside = np.clip(values, 0.0, 1.0)
            return inside if sign < 0 else 1.0 - inside
        # u = (loss − low) / (high − low), v = 2u − 1, score = (1 − v / (1 + |v|)) / 2
        with np.errstate(invalid="ignore"):
            v = 2.0 * (np.clip(sign * values, -1e300, 1e300) - low) / (high - low) - 1.0
        return np.asarray((1.0 - v / (1.0 + np.abs(v))) / 2.0)


def _is_share(values: Floats) -> bool:
    finite = values[np.isfinite(values)]
    return bool(np.all((finite >= 0.0) & (finite <= 1.0)))


def _segments_of(problem: Problem) -> SegmentSpace:
    space = problem.space
    if not isinstance(space, SegmentSpace) or space.gram is None:
        received = "none" if space is None else f"one of {space.title}"
        raise InputError(
            "strategy.name: m2n2 expects a space of segments that knows the inner products of the "
            "experts, received "
            f"{received}; choose cma_es, or search merges of models"
        )
    return space
