"""The front that models predict, and which of its points to measure next.

Li 2024 (MAP, arXiv 2406.07529) searches the front of the surrogate with NSGA-III in a box far
beyond the samples. Here the surrogates are quadratics behind increasing links, so that their front
is that of the quadratics themselves, and minimising weighted sums of these, for many weightings at
once, finds it to more digits in a fraction of the time (see ``tests/search/strategies/test_map.py``
for a comparison with NSGA-II). The search stays where points have been measured.

Next is measured what adds most volume to the front that the surrogate predicts at known points
(greedy subset selection, as in Emmerich 2005, "An EMO algorithm using the hypervolume measure as
selection criterion"). Predictions are compared with predictions: lucky measurements hide nothing,
and a model that is too optimistic somewhere does not ask for the same point again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergesearch.search.front import MARGIN, hypervolume, nondominated
from mergesearch.search.strategies.parts.map_ridge import Array
from mergesearch.search.strategies.parts.map_surrogate import Frame, Model

#: Weightings per search of the front, and descent steps of each.
WEIGHTINGS = 60
STEPS = 150
#: Objectives up to which what a point adds is its volume; weightings that decide above.
VOLUME_LIMIT = 5
R2_WEIGHTINGS = 256


@dataclass(frozen=True, eq=False)
class Region:
    """The region of the samples: their box, up to the distance of the farthest from the centre.

    Attributes:
        frame: Coordinates in which distance is measured.
        lower, upper: Box of the samples in that frame, ``(dim,)``.
        radius: Largest distance of a sample from the centre.
    """

    frame: Frame
    lower: Array
    upper: Array
    radius: float

    @classmethod
    def of(cls, frame: Frame, points: Array) -> Region:
        """The region of points ``(n, dim)``."""
        offsets = frame.offsets(points)
        radius = float(np.sqrt(np.max(np.sum(offsets**2, axis=1))))
        return cls(frame, offsets.min(axis=0), offsets.max(axis=0), radius)

    def pull(self, offsets: Array) -> Array:
        """Offsets ``(n, dim)`` moved into the region: into the box, then towards its centre."""
        offsets = np.clip(offsets, self.lower, self.upper)
        length = np.sqrt(np.sum(offsets**2, axis=1, keepdims=True))
        return np.asarray(offsets * np.minimum(1.0, self.radius / np.maximum(length, 1e-300)))


@dataclass(frozen=True, eq=False)
class PredictedFront:
    """Points ``(n, dim)`` in the unit cube that no other is predicted to dominate.

    ``losses`` are the predicted ones, ``(n, objectives)``.
    """

    points: Array
    losses: Array


def weightings(objectives: int, count: int, shift: Array) -> Array:
    """Weights that sum to 1, ``(count + objectives, objectives)``.

    The first are those of every objective nearly alone, the others mixtures.

    Args:
        objectives: Number of objectives.
        count: Number of mixtures.
        shift: ``(objectives,)`` in [0, 1): other shifts give other mixtures, as evenly spread.
    """
    if objectives == 1:
        return np.ones((1, 1))
    # A lattice of the generalised golden ratio (Roberts 2018), made exponential; the power favours
    # the ends.
    golden = 1.5
    for _ in range(30):
        golden = (1.0 + golden) ** (1.0 / (objectives + 1))
    uniform = (
        np.arange(1, count + 1)[:, None] * golden ** -np.arange(1.0, objectives + 1) + shift
    ) % 1.0
    mixed = (-np.log(np.clip(uniform, 1e-12, 1.0 - 1e-12))) ** 1.5
    alone = np.full((objectives, objectives), 1e-3) + (1.0 - 1e-3 * objectives) * np.eye(objectives)
    return np.vstack([alone, mixed / mixed.sum(axis=1, keepdims=True)])


def predict(models: Sequence[Model], points: Array) -> Array:
    """Losses ``(n, objectives)`` at points ``(n, dim)``."""
    return np.stack([model.predict(points) for model in models], axis=1)


def predict_front(models: Sequence[Model], points: Array, shift: Array) -> PredictedFront:
    """The front of the models in the region of the points ``(n, dim)``.

    For ``shift`` see :func:`weightings`.
    """
    region = Region.of(models[0].frame, points)
    latent = np.stack([model.quadratic(region.frame.offsets(points)) for model in models], axis=1)
    unit = np.maximum(latent.std(axis=0), 1e-300)
    weights = weightings(len(models), WEIGHTINGS, shift) / unit
    starts = region.frame.offsets(points[np.argmin(latent @ weights.T, axis=0)])
    solved = descend(models, weights, starts, region)
    candidates = np.vstack([solved, _between(solved, predict(models, region.frame.points(solved)))])
    candidates = np.clip(region.frame.points(candidates), 0.0, 1.0)
    losses = predict(models, candidates)
    keep = nondominated(losses)
    return PredictedFront(candidates[keep], losses[keep])


def _between(solved: Array, losses: Array) -> Array:
    """Half way from every solution to its two nearest in the objectives.

    These points fill gaps, also where the front is concave.
    """
    if len(solved) < 3:
        return solved
    scaled = losses / np.maximum(np.ptp(losses, axis=0), 1e-300)
    distance = np.sum((scaled[:, None] - scaled[None]) ** 2, axis=2)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :2]
    return np.vstack([0.5 * (solved + solved[nearest[:, rank]]) for rank in range(2)])


def descend(models: Sequence[Model], weights: Array, starts: Array, region: Region) -> Array:
    """Minimise weighted sums of the quadratics in the region, all at once.

    Accelerated projected gradients: Nesterov 1983 with the adaptive restart of O'Donoghue 2015,
    "Adaptive Restart for Accelerated Gradient Schemes".

    Args:
        models: One per objective.
        weights: ``(rows, objectives)``.
        starts: ``(rows, dim)`` in the region's frame.
        region: Where to stay.

    Returns:
        ``(rows, dim)``, never worse than the starts.
    """
    step = 1.0 / (weights @ _steepness(models, region))[:, None]
    here = starts
    ahead = starts
    momentum = np.ones((len(starts), 1))
    for _ in range(STEPS):
        # x_{k+1} = Π(y_k − t ∇f(y_k)), y_{k+1} = x_{k+1} + (θ_k − 1) / θ_{k+1} · (x_{k+1} − x_k)
        # with θ_{k+1} = (1 + √(1 + 4 θ_k²)) / 2; θ begins anew where the step turns back.
        there = region.pull(ahead - step * _gradient(models, weights, ahead))
        turned = np.sum((ahead - there) * (there - here), axis=1, keepdims=True) > 0
        momentum = np.where(turned, 1.0, momentum)
        larger = 0.5 * (1.0 + np.sqrt(1.0 + 4.0 * momentum**2))
        ahead = there + np.where(turned, 0.0, (momentum - 1.0) / larger) * (there - here)
        here = there
        momentum = larger
    better = _weighted(models, weights, here) < _weighted(models, weights, starts)
    return np.where(better[:, None], here, starts)


def _gradient(models: Sequence[Model], weights: Array, offsets: Array) -> Array:
    parts = [
        w[:, None] * (offsets @ m.quadratic.A + m.quadratic.b)
        for m, w in zip(models, weights.T, strict=True)
    ]
    return np.asarray(sum(parts))


def _weighted(models: Sequence[Model], weights: Array, offsets: Array) -> Array:
    return np.asarray(sum(w * m.quadratic(offsets) for m, w in zip(models, weights.T, strict=True)))


def _steepness(models: Sequence[Model], region: Region) -> Array:
    """Largest curvature of each quadratic ``(objectives,)``.

    A flat one counts as curved enough for a step that crosses the region.
    """
    sizes = [
        float(np.abs(np.linalg.eigvalsh(model.quadratic.A)).max(initial=0.0))
        + 0.1 * float(np.linalg.norm(model.quadratic.b)) / max(region.radius, 1e-9)
        for model in models
    ]
    return np.maximum(sizes, 1e-12 * max(*sizes, 1e-280))


# --- what to measure next
# ----------------------------------------------------------------------------


def choose(front: Array, known: Array, count: int) -> list[int]:
    """Up to ``count`` rows of ``front`` ``(n, objectives)`` that add most to ``known``, most first.

    What is added is volume up to the worst anchor or the worst of the front, whichever is farther;
    with many objectives, whose volumes take too long, what :func:`_choose_for_weightings` says.
    Losses are normalised.
    """
    reference = np.maximum(
        1.0 + MARGIN, front.max(axis=0) + MARGIN * np.maximum(np.ptp(front, axis=0), 1e-9)
    )
    if front.shape[1] > VOLUME_LIMIT:
        return _choose_for_weightings(front, known, count, reference)
    known = known[(known < reference).all(axis=1)]
    known = known[nondominated(known)] if len(known) else known
    gains = np.array([_gain(row, known, reference) for row in front])
    tiny = 1e-12 * float(np.prod(reference - front.min(axis=0)))
    chosen: list[int] = []
    while len(chosen) < count:
        best = int(np.argmax(gains))
        gain = _gain(front[best], known, reference)
        if gains[best] <= tiny:
            break
        if gain < gains[best]:
            gains[best] = (
                gain  # gains only shrink: one that was too high is looked at again in its turn
            )
            continue
        chosen.append(best)
        known = np.vstack([known, front[best]])
        gains[best] = 0.0
    return chosen


def _gain(row: Array, known: Array, reference: Array) -> float:
    """Volume that ``row`` adds: its own box, less what is known of that box (While 2012)."""
    own = float(np.prod(np.maximum(reference - row, 0.0)))
    return own - hypervolume(np.maximum(known, row), reference) if len(known) and own else own


def _choose_for_weightings(front: Array, known: Array, count: int, reference: Array) -> list[int]:
    """The rows that improve most for many weightings.

    Brockhoff 2012, "On the properties of the R2 indicator".

    A weighting sees the largest weighted distance from the best corner of the front (Chebyshev).
    """
    ideal = front.min(axis=0)
    weights = weightings(front.shape[1], R2_WEIGHTINGS, np.full(front.shape[1], 0.5)) / (
        reference - ideal
    )
    seen = np.stack([np.max(row * weights, axis=1) for row in front - ideal])
    best = np.max((reference - ideal) * weights, axis=1)
    for row in np.maximum(known - ideal, 0.0):
        best = np.minimum(best, np.max(row * weights, axis=1))
    chosen: list[int] = []
    while len(chosen) < count:
        gains = np.sum(np.maximum(best - seen, 0.0), axis=1)
        chosen.append(int(np.argmax(gains)))
        best = np.minimum(best, seen[chosen[-1]])
        if gains[chosen[-1]] <= 1e-9:
            return chosen[:-1]
    return chosen
