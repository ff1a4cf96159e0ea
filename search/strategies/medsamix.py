"""A method and its parameters for every group of layers: random-forest Bayesian optimisation,
Hyperband, ParEGO.

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

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field as Bound

from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.parts.sampling import reflect

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: Weight of the sum in the augmented Tchebycheff function (Knowles 2006, section II).
RHO = 0.05
#: Results before the first forest.
ENOUGH = 10
#: Share of suggestions that the forest has no say in: it is too sure of methods that it has hardly
#: seen. (Hutter 2011 takes every other one. With one in ten, 2 of 6 small searches ended near where
#: they had begun.)
UNGUIDED = 1 / 3
#: Best results of each rung that candidates are neighbours of.
PARENTS = 5
#: Bound on candidates per round, and on their numbers altogether.
CANDIDATES = 300
NUMBERS = 150_000
#: Features that a split chooses from, and results that a tree sees, at most.
FEATURES = 100
SAMPLES = 1000


class MedSaMix:
    """Forest, Hyperband and ParEGO over conditional dimensions.

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
        self._moves = Moves(problem, self._rng)
        self._rungs = rungs_of(problem.items, eta, min_items)
        self._schedule = bracket_rungs(len(self._rungs), eta)
        self._results = Results(problem.objectives, len(self._rungs))
        self._reached: dict[
            bytes, int
        ] = {}  # configuration -> highest rung that it was asked or told on
        self._promoted = [0] * len(self._rungs)
        self._forest: Forest | None = None
        self._asked = 0
        self._first = iter(self._initial())
        self.tell(problem.anchors)

    def ask(self, count: int) -> list[Suggestion]:
        """Promotions where there are any, else new configurations."""
        return [self._suggest() for _ in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        """Keep results; those on a number of items that is no rung teach the forest alone."""
        for trial in trials:
            if trial.evaluated is not None and len(self._rungs) == 1:
                continue
            point = self._moves.canonical(trial.point)
            share = 1.0 if trial.evaluated is None else trial.evaluated / self._problem.items
            top = len(self._rungs) - 1
            rung = (
                top
                if share >= 1
                else next((k for k, n in enumerate(self._rungs) if n == trial.evaluated), -1)
            )
            self._results.add(point, trial.losses, share, rung)
            self._reach(key_of(point), rung)

    def best(self) -> list[Point]:
        """Nothing beyond the best trials."""
        return []

    def _reach(self, key: bytes, rung: int) -> None:
        self._reached[key] = max(rung, self._reached.get(key, -1))

    def _suggest(self) -> Suggestion:
        weights = simplex_weights(self._problem.objectives, self._rng)
        found = self._promotion(weights)
        if found is None:
            found = self._new(weights), next(self._schedule)
        point, rung = found
        self._reach(key_of(point), rung)
        self._asked += 1
        return Suggestion(
            self._asked - 1, point, self._rungs[rung] if rung < len(self._rungs) - 1 else None
        )

    def _promotion(self, weights: Array) -> tuple[Point, int] | None:
        """The configuration to try on the next rung, from the highest rung that has one (Li 2020,
        algorithm 2).
        """
        for rung in reversed(range(len(self._rungs) - 1)):
            members = self._results.members[rung]
            quota = len(members) // self._eta
            # Under random weights others come out on top every time: only as many as belong to the
            # top may go.
            if not quota or (self._problem.objectives > 1 and self._promoted[rung] >= quota):
                continue
            scores = self._results.scores(members, weights)
            for place in np.argsort(scores, kind="stable")[:quota]:
                point = self._results.points[members[place]]
                if math.isfinite(scores[place]) and self._reached[key_of(point)] == rung:
                    self._promoted[rung] += 1
                    return point, rung + 1
        return None

    def _new(self, weights: Array) -> Point:
        """A configuration that has not been tried: of the initial ones, or of the largest expected
        improvement.
        """
        for point in self._first:
            if key_of(point) not in self._reached:
                return point
        parents = self._parents(weights)
        candidates = self._moves.around(parents, self._moves.size)
        if self._results.successes < ENOUGH or self._rng.random() < UNGUIDED:
            return self._untried(candidates, self._rng.permutation(len(candidates)))
        forest = self._fitted()
        rank = forest.ranking(candidates, weights, self._results.best(weights))
        closer = self._moves.neighbours(candidates[rank[:PARENTS]], self._moves.size)
        candidates = np.concatenate([candidates, closer])
        return self._untried(
            candidates, forest.ranking(candidates, weights, self._results.best(weights))
        )

    def _untried(self, candidates: Array, order: npt.NDArray[np.intp]) -> Point:
        """The first candidate that is new, or the first of all where none is."""
        fresh = (
            candidates[place] for place in order if key_of(candidates[place]) not in self._reached
        )
        return next(fresh, candidates[order[0]])

    def _parents(self, weights: Array) -> Array:
        """The best configurations of every rung, or the start."""
        found = [self._moves.start]
        for members in self._results.members:
            scores = self._results.scores(members, weights)
            best = [
                place
                for place in np.argsort(scores, kind="stable")[:PARENTS]
                if math.isfinite(scores[place])
            ]
            found += [self._results.points[members[place]] for place in best]
        return np.array(found[1:] or found)

    def _fitted(self) -> Forest:
        count = self._results.successes
        if self._forest is None or count >= 1.1 * self._forest.results:
            seed = int(self._rng.integers(2**31))
            self._forest = Forest.fit(self._results, self._moves.features, self._trees, seed)
        return self._forest

    def _initial(self) -> Iterator[Point]:
        """The start, and every expert by itself where the space knows them."""
        yield self._moves.start
        yield from getattr(self._problem.space, "seeds", ())


# --- rungs
# ----------------------------------------------------------------------------


def rungs_of(items: int, eta: int, least: int | None = None) -> list[int]:
    """Items of each rung, the last with all of them: items / eta^k, as long as that is no less than
    ``least``.
    """
    least = max(items // eta**2, 10) if least is None else least
    rungs = [items]
    while rungs[0] / eta >= least:
        rungs.insert(0, round(items / eta ** len(rungs)))
    return rungs


def bracket_rungs(rungs: int, eta: int) -> Iterator[int]:
    """The rung on which each new configuration begins, in the proportions of Hyperband's brackets,
    again and again.

    Bracket s of 0, ..., s_max has ⌈(s_max + 1) / (s + 1) · eta^s⌉ configurations (Li 2018,
    algorithm 1); the largest s comes first and begins lowest.
    """
    highest = rungs - 1
    while True:
        for s in reversed(range(rungs)):
            for _ in range(-(-rungs * eta**s // (s + 1))):
                yield highest - s


# --- several objectives
# ----------------------------------------------------------------------------


def simplex_weights(objectives: int, rng: np.random.Generator) -> Array:
    """Weights ``(objectives,)``, uniform over those that sum to 1."""
    return np.ones(1) if objectives == 1 else rng.dirichlet(np.ones(objectives))


def augmented_tchebycheff(losses: Array, weights: Array) -> Array:
    """max_i λ_i f_i + ρ Σ_i λ_i f_i (Knowles 2006, eq. 2), ``(..., objectives) -> (...)``."""
    weighted = losses * weights
    return np.asarray(weighted.max(axis=-1) + RHO * weighted.sum(axis=-1))


class Results:
    """What has been told, with losses scaled by their range.

    Attributes:
        points: Canonical points.
        members: Numbers of the results on each rung, failures included.
        successes: Number of results that have losses.
    """

    def __init__(self, objectives: int, rungs: int) -> None:
        self.points: list[Point] = []
        self.members: list[list[int]] = [[] for _ in range(rungs)]
        self.successes = 0
        self._objectives = objectives
        self._losses: list[Array] = []
        self._shares: list[float] = []
        self._scaled: Array | None = None

    def add(self, point: Point, losses: Array | None, share: float, rung: int) -> None:
        """A result on a share of the items; ``rung`` -1 where that is none of the rungs."""
        if rung >= 0:
            self.members[rung].append(len(self.points))
        self.points.append(point)
        self._losses.append(np.full(self._objectives, np.nan) if losses is None else losses)
        self._shares.append(share)
        self.successes += losses is not None
        self._scaled = None

    @property
    def scaled(self) -> Array:
        """Losses between 0 and 1, NaN for failures, ``(results, objectives)``."""
        if self._scaled is None:
            losses = np.array(self._losses).reshape(-1, self._objectives)
            self._scaled = scale_losses(losses) if self.successes else losses
        return self._scaled

    def scores(self, members: Sequence[int], weights: Array) -> Array:
        """One number to minimise for each result; infinite for failures."""
        scores = augmented_tchebycheff(self.scaled[members], weights)
        return np.where(np.isnan(scores), np.inf, scores)

    def best(self, weights: Array) -> float:
        """The lowest score on the highest rung that has one."""
        lowest = (
            self.scores(members, weights).min(initial=np.inf) for members in reversed(self.members)
        )
        return next((float(score) for score in lowest if score < np.inf), 1.0)

    def training(self) -> tuple[Array, Array, Array]:
        """Points ``(n, dim)``, log shares of the items ``(n,)`` and scaled losses
        ``(n, objectives)`` of successes.
        """
        kept = np.flatnonzero(~np.isnan(self.scaled[:, 0]))
        points = np.array([self.points[place] for place in kept])
        return points, np.log([self._shares[place] for place in kept]), self.scaled[kept]


def scale_losses(losses: Array) -> Array:
    """Losses ``(n, objectives)`` from their lowest, 0, to their highest, 1; NaN stays NaN.

    What lies more than three interquartile ranges above the third quartile counts as being there
    (Tukey 1977).
    """
    low, first, third, high = np.nanquantile(losses, [0.0, 0.25, 0.75, 1.0], axis=0)
    high = np.minimum(high, third + 3 * (third - first))
    return np.asarray(np.minimum((losses - low) / np.where(high > low, high - low, 1.0), 1.0))


# --- the model
# ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Forest:
    """Regression trees on coordinates and the number of items, for all objectives at once.

    Attributes:
        trees: Fitted trees.
        features: Points ``(n, dim)`` -> columns for the trees.
        results: Number of results that it was fitted to.
        fidelity: Whether the last column is the logarithm of the share of items.
    """

    trees: Sequence[Any]
    features: Callable[[Array], Array]
    results: int
    fidelity: bool

    @classmethod
    def fit(
        cls, results: Results, features: Callable[[Array], Array], trees: int, seed: int
    ) -> Forest:
        """Fit to all successes."""
        from sklearn.ensemble import ExtraTreesRegressor

        points, shares, losses = results.training()
        columns = features(points)
        fidelity = bool(np.any(shares < 0))
        if fidelity:
            columns = np.column_stack([columns, shares])
        # Splits at random places, as in SMAC's forest: smoother, and cheaper, than the best ones.
        model = ExtraTreesRegressor(
            trees,
            bootstrap=True,
            max_features=min(max(round(columns.shape[1] * 5 / 6), 1), FEATURES),
            max_samples=min(len(columns), SAMPLES),
            random_state=seed,
            n_jobs=1,
        )
        model.fit(columns, losses if losses.shape[1] > 1 else losses[:, 0])
        return cls(model.estimators_, features, results.successes, fidelity)

    def predict(self, points: Array) -> Array:
        """Losses on all items by every tree, ``(trees, n, objectives)``."""
        columns = self.features(points)
        if self.fidelity:
            columns = np.column_stack([columns, np.zeros(len(columns))])
        narrow = columns.astype(np.float32)
        return np.array(
            [
                tree.predict(narrow, check_input=False).reshape(len(points), -1)
                for tree in self.trees
            ]
        )

    def ranking(self, points: Array, weights: Array, best: float) -> npt.NDArray[np.intp]:
        """Points in falling order of their expected improvement, then in rising order of the
        mean.
        """
        scores = augmented_tchebycheff(self.predict(points), weights)
        mean = scores.mean(axis=0)
        deviation = scores.std(axis=0)
        return np.lexsort((mean, -expected_improvement(mean, deviation, best)))


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """E max(best − x, 0) of normal x (Jones 1998, "Efficient global optimization", eq. 15)."""
    from scipy.special import ndtr

    safe = np.maximum(deviation, 1e-12)
    z = (best - mean) / safe
    return np.asarray(safe * (z * ndtr(z) + np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)))


# --- the space
# ----------------------------------------------------------------------------


class Moves:
    """How configurations are changed and shown to the forest.

    Args:
        problem: The box; its space may have ``dimensions``, ``canonical`` and ``active``.
        rng: Source of all randomness.
    """

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self._rng = rng
        self._lower = problem.lower
        self._upper = problem.upper
        self._width = problem.width
        dimensions = getattr(problem.space, "dimensions", None)
        self._space: Any = None if dimensions is None else problem.space
        kinds = np.array(
            ["real"] * problem.dim if dimensions is None else [d.kind for d in dimensions]
        )
        counts = (
            [1] * problem.dim
            if dimensions is None
            else [max(len(d.choices), 1) for d in dimensions]
        )
        self._counts = np.array(counts)
        self._real = kinds == "real"
        self._named = kinds == "categorical"
        self._free = (self._width > 0) & (self._real | (self._counts > 1))
        self.start = self.canonical(problem.start)
        self.size = int(np.clip(NUMBERS // problem.dim, 30, CANDIDATES))

    def canonical(self, points: Array) -> Array:
        """The same merges with what does not matter taken out, ``(..., dim)``."""
        return (
            np.asarray(points) if self._space is None else np.asarray(self._space.canonical(points))
        )

    def features(self, points: Array) -> Array:
        """Columns for the forest: coordinates scaled by the box, one column for each name of a
        categorical one.
        """
        scaled = (points - self._lower) / np.where(self._width > 0, self._width, 1.0)
        columns = [scaled[:, ~self._named]]
        for place in np.flatnonzero(self._named):
            columns.append(np.floor(points[:, [place]]) == np.arange(self._counts[place]))
        return np.column_stack(columns)

    def around(self, parents: Array, count: int) -> Array:
        """Neighbours of ``parents``, and as many from all over, ``(count, dim)``."""
        far = count // 2
        return np.concatenate([self.neighbours(parents, count - far), self.scattered(far)])

    def scattered(self, count: int) -> Array:
        """Real coordinates around the start, choices at random."""
        points = np.tile(self.start, (count, 1))
        return self._redrawn(points, np.broadcast_to(self._free, points.shape), self.start)

    def neighbours(self, parents: Array, count: int) -> Array:
        """Configurations in which one or more, at most all, active coordinates of a parent have
        moved.
        """
        before = parents[self._rng.integers(len(parents), size=count)]
        active = self._active(before) & self._free
        moved = self._chosen(active)
        sigma = np.exp(self._rng.uniform(math.log(0.02), math.log(0.3), (count, 1)))
        stepped = before + sigma * self._width * self._rng.standard_normal(before.shape)
        after = np.where(moved & self._real, stepped, before)
        after = np.where(moved & ~self._real, self._other_choices(before), after)
        # Clipped, not reflected: the faces (an expert left out, the end of an arc) are merges of
        # their own.
        after = np.clip(after, self._lower, self._upper)
        # A method that has just been chosen gets parameters of its own.
        return self._redrawn(
            after, self._active(after) & ~self._active(before) & self._free, self._middle
        )

    def _chosen(self, active: Mask) -> Mask:
        """Some active coordinates of each row, at least one; how many is as likely 1 or 2 as 10 or
        20.
        """
        count = np.maximum(active.sum(axis=1), 1)
        share = np.exp(self._rng.random(len(active)) * np.log(count)) / count
        dice = np.where(active, self._rng.random(active.shape), 2.0)
        lowest = dice.min(axis=1, keepdims=True)
        return np.asarray(active & ((dice < share[:, None]) | (dice == lowest)))

    def _other_choices(self, before: Array) -> Array:
        """Another name, or the next number up or down, in the middle of its bin."""
        codes = np.floor(before)
        dice = self._rng.random(before.shape)
        named = (codes + 1 + np.floor(dice * (self._counts - 1))) % self._counts
        stepped = np.where(
            codes == 0,
            1,
            np.where((codes == self._counts - 1) | (dice < 0.5), codes - 1, codes + 1),
        )
        return np.where(self._named, named, stepped) + 0.5

    def _redrawn(self, points: Array, where: Mask, centre: Point) -> Array:
        """New values at the marked places: normal around ``centre``, choices at random; then
        canonical.
        """
        near = centre + 0.25 * self._width * self._rng.standard_normal(points.shape)
        choice = np.floor(self._rng.random(points.shape) * self._counts) + 0.5
        drawn = np.where(self._real, reflect(near, self._lower, self._upper), choice)
        return self.canonical(np.where(where, drawn, points))

    def _active(self, points: Array) -> Mask:
        if self._space is None:
            return np.ones(points.shape, bool)
        return np.asarray(self._space.active(points))

    @property
    def _middle(self) -> Point:
        return (self._lower + self._upper) / 2


def key_of(point: Point) -> bytes:
    """Short identity of a canonical point."""
    return hashlib.blake2b(np.ascontiguousarray(point).tobytes(), digest_size=16).digest()
