"""MedSAMix: random-forest search for a method, and its parameters, in every group of layers.

Yang 2025, "MedSAMix: a training-free model merging approach for medical image segmentation" (arXiv
2508.11032), whose search is SMAC: a forest predicts the losses, and the candidate with the largest
expected improvement is tried next (Hutter 2011, "Sequential model-based optimization for general
algorithm configuration"). What we changed:

* Parameters of methods that are not chosen are inactive: neither moved nor told apart by the
  forest.
* Nothing waits: promotions between rungs of items are asynchronous (Li 2020, "A system for
  massively parallel hyperparameter tuning", ASHA), over the brackets of Hyperband (Li 2018,
  "Hyperband").
* One forest predicts all objectives on any number of items (a feature); it is fitted again when
  there are a tenth more results. Each suggestion weighs what its trees say with random weights of
  its own (Knowles 2006, "ParEGO").
* Failed trials are never fitted; losses far above the rest are pulled in: one broken merge would
  level all others.

In a space without ``dimensions`` all coordinates are real and active.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.configurations import ConfigurationSpace, identity_of
from mergesearch.search.strategies.parts.random_forest import Forest, Results, simplex_weights
from mergesearch.search.strategies.parts.rungs import bracket_rungs, rungs_of
from mergesearch.search.strategies.parts.suggestion_book import SuggestionBook

Array = npt.NDArray[np.float64]

#: Results before the first forest.
ENOUGH = 10
#: Share of suggestions that the forest has no say in: it is too sure of methods that it has hardly
#: seen. (Hutter 2011 takes every other one. With one in ten, 2 of 6 small searches ended near where
#: they had begun.)
UNGUIDED = 1 / 3
#: Best results of each rung that candidates are neighbours of.
PARENTS = 5


class MedSaMix:
    """A random forest, Hyperband and ParEGO over conditional dimensions.

    Args:
        problem: The box, and the space if it has ``dimensions``.
        seed: Seed of the strategy's generator, which the forests' seeds are drawn from.
        trees: Trees of the forest.
        eta: Each rung has this many times the items of the one below, and one of so many of its
            trials.
        min_items: Items of the lowest rung at least; default: items / eta², and no less than 10.
            All trials are evaluated on all items where these are fewer than ``eta`` times as many.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = False

    def __init__(
        self,
        problem: Problem,
        seed: int,
        *,
        trees: Annotated[int, Bound(ge=2)] = 30,
        eta: Annotated[int, Bound(ge=2)] = 3,
        min_items: Annotated[int, Bound(ge=1)] | None = None,
    ) -> None:
        self._problem = problem
        self._trees = trees
        self._eta = eta
        self._rng = np.random.default_rng(seed)
        self._space = ConfigurationSpace(problem, self._rng)
        self._rungs = rungs_of(problem.items, eta, min_items)
        self._schedule = bracket_rungs(len(self._rungs), eta)
        self._results = Results(problem.objectives, len(self._rungs))
        # Configuration -> highest rung that it was asked or told on.
        self._reached: dict[bytes, int] = {}
        self._promoted = [0] * len(self._rungs)
        self._forest: Forest | None = None
        self._book = SuggestionBook[None]()
        self._first = iter(self._initial())
        self.tell(problem.anchors)

    def ask(self, count: int) -> list[Suggestion]:
        """Promotions where there are any, else new configurations."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Keep results; those on a number of items that is no rung only train the forest."""
        for trial in trials:
            if trial.evaluated is not None and len(self._rungs) == 1:
                continue
            point = self._space.canonical(trial.point)
            share = 1.0 if trial.evaluated is None else trial.evaluated / self._problem.items
            top = len(self._rungs) - 1
            rung = (
                top
                if share >= 1
                else next((k for k, n in enumerate(self._rungs) if n == trial.evaluated), -1)
            )
            self._results.add(point, trial.losses, share, rung)
            self._reach(identity_of(point), rung)

    def best(self) -> list[Point]:
        """Nothing beyond the best trials."""
        return []

    def _reach(self, key: bytes, rung: int) -> None:
        self._reached[key] = max(rung, self._reached.get(key, -1))

    def _suggest(self) -> Suggestion:
        weights = simplex_weights(self._problem.objectives, self._rng)
        point, rung = self._promotion(weights) or (self._new(weights), next(self._schedule))
        self._reach(identity_of(point), rung)
        items = self._rungs[rung] if rung < len(self._rungs) - 1 else None
        return self._book.issue(point, items=items)

    def _promotion(self, weights: Array) -> tuple[Point, int] | None:
        """A configuration and the next rung, from the highest rung with one to promote.

        Li 2020, algorithm 2.
        """
        for rung in reversed(range(len(self._rungs) - 1)):
            members = self._results.members[rung]
            quota = len(members) // self._eta
            # Under random weights others come out on top every time: only as many as belong to the
            # top may go.
            if not quota or (self._problem.objectives > 1 and self._promoted[rung] >= quota):
                continue
            scores = self._results.scores(members, weights)
            for rank in np.argsort(scores, kind="stable")[:quota]:
                point = self._results.points[members[rank]]
                if math.isfinite(scores[rank]) and self._reached[identity_of(point)] == rung:
                    self._promoted[rung] += 1
                    return point, rung + 1
        return None

    def _new(self, weights: Array) -> Point:
        """An untried configuration: an initial one, or one of large expected improvement."""
        for point in self._first:
            if identity_of(point) not in self._reached:
                return point
        parents = self._parents(weights)
        candidates = self._space.around(parents, self._space.size)
        if self._results.successes < ENOUGH or self._rng.random() < UNGUIDED:
            return self._untried(candidates, self._rng.permutation(len(candidates)))
        forest = self._fitted()
        rank = forest.ranking(candidates, weights, self._results.best(weights))
        closer = self._space.neighbours(candidates[rank[:PARENTS]], self._space.size)
        candidates = np.concatenate([candidates, closer])
        return self._untried(
            candidates, forest.ranking(candidates, weights, self._results.best(weights))
        )

    def _untried(self, candidates: Array, order: npt.NDArray[np.intp]) -> Point:
        """The first candidate that is new, or the first of all where none is."""
        ordered = candidates[order]
        fresh = (point for point in ordered if identity_of(point) not in self._reached)
        return next(fresh, ordered[0])

    def _parents(self, weights: Array) -> Array:
        """The best configurations of every rung, or the start ``(n, dim)``."""
        parents: list[Point] = []
        for members in self._results.members:
            scores = self._results.scores(members, weights)
            best = np.argsort(scores, kind="stable")[:PARENTS]
            parents += [
                self._results.points[members[rank]] for rank in best if math.isfinite(scores[rank])
            ]
        return np.array(parents or [self._space.start])

    def _fitted(self) -> Forest:
        count = self._results.successes
        if self._forest is None or count >= 1.1 * self._forest.results:
            seed = int(self._rng.integers(2**31))
            self._forest = Forest.fit(self._results, self._space.features, self._trees, seed)
        return self._forest

    def _initial(self) -> Iterator[Point]:
        """The start, and every expert by itself where the space knows them."""
        yield self._space.start
        yield from getattr(self._problem.space, "seeds", ())
