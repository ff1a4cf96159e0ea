"""Where populations begin: the known merges, mixtures of them, and draws around the best.

Good merges lie near the anchors, so no population starts uniformly over the box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from mergesearch.search.front import nondominated
from mergesearch.search.strategies.base import Point, Problem, TrialResult
from mergesearch.search.strategies.parts.sampling import reflect

#: Standard deviation of the first draws as a share of the range, and the dimension from which it
#: shrinks.
SPREAD = 0.2
SPREAD_LIMIT = 10

#: Of so many known merges, the best, midpoints are worth measuring; other runs may give thousands.
PAIRED = 64


def known_merges(problem: Problem) -> list[TrialResult]:
    """The anchors that were measured whole, each point once, best first."""
    whole = [
        anchor
        for anchor in problem.anchors
        if anchor.losses is not None and anchor.evaluated is None
    ]
    by_point: dict[bytes, TrialResult] = {}
    for anchor in sorted(whole, key=lambda anchor: loss_of(anchor, problem)):
        by_point.setdefault(key_of(anchor.point), anchor)
    return list(by_point.values())


def starting_points(problem: Problem) -> list[Point]:
    """Points worth measuring first: the start, then midpoints of two known merges.

    Those of the best merges come first.

    Points that are known already are left out.
    """
    known = [anchor.point for anchor in known_merges(problem)]
    paired = range(min(len(known), PAIRED))
    pairs = sorted(itertools.combinations(paired, 2), key=lambda pair: (sum(pair), pair))
    middles = (0.5 * (known[first] + known[second]) for first, second in pairs)
    return distinct([*known, problem.start, *middles])[len(known) :]


def first_points(
    problem: Problem, rng: np.random.Generator, count: int, sigma: float | None = None
) -> list[Point]:
    """``count`` points to measure that complete a population of known merges.

    At most half are :func:`starting_points`; the rest are draws around the known merges that no
    other dominates, in turn, for the directions that known merges do not span.
    """
    points = starting_points(problem)[: (count + 1) // 2]
    centres = _undominated(known_merges(problem)) or [problem.start]
    missing = range(count - len(points))
    return points + [
        draw_near(centres[index % len(centres)], problem, rng, sigma) for index in missing
    ]


def draw_near(
    centre: Point, problem: Problem, rng: np.random.Generator, sigma: float | None = None
) -> Point:
    """A normal draw around ``centre``, folded into the box; all ``(dim,)``.

    Its standard deviation is ``sigma`` times the range.
    """
    step = (sigma or default_sigma(problem.dim)) * problem.width * rng.standard_normal(problem.dim)
    return reflect(centre + step, problem.lower, problem.upper)


def default_sigma(dim: int) -> float:
    """Spread of the first draws as a fraction of the range: 0.2 up to ten dimensions.

    Beyond, the length of a draw stays the same, as losses grow with the distance.
    """
    return SPREAD * min(1.0, math.sqrt(SPREAD_LIMIT / max(dim, 1)))


def _undominated(known: Sequence[TrialResult]) -> list[Point]:
    if not known:
        return []
    front = nondominated(np.array([anchor.losses for anchor in known]))
    return [anchor.point for anchor, best in zip(known, front, strict=True) if best]


def loss_of(trial: TrialResult, problem: Problem) -> float:
    """The weighted sum of a trial's losses; infinite, worse than any other, where it failed."""
    return math.inf if trial.losses is None else problem.scalarise(trial.losses)


def distinct(points: Iterable[Point]) -> list[Point]:
    """Each point once, in the order of first appearance."""
    by_key: dict[bytes, Point] = {}
    for point in points:
        by_key.setdefault(key_of(point), point)
    return list(by_key.values())


def key_of(point: Point) -> bytes:
    """Bytes that are equal for equal points; adding 0 turns -0.0 into 0.0."""
    return (point + 0.0).tobytes()
