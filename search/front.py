"""Metrics of Pareto fronts: dominance, hypervolume, and the members worth a second look.

All functions take losses (minimised); only :func:`to_losses` flips signs.
Figures stay comparable during a whole study because a :class:`Normaliser` is made once, from the
anchors. Volumes come from moocore (C), whose values equal those of the other libraries at a
fiftieth of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective
from mergesearch.merging import InputError, StudyFailedError

Array = npt.NDArray[np.float64]

#: The reference point lies this far behind the worst anchor, as a share of the anchors' range.
MARGIN = 0.1


def signs(objectives: Sequence[Objective]) -> Array:
    """Factor from values in the user's direction to losses, ``(objectives,)``."""
    return np.array(
        [-1.0 if objective.direction == "maximize" else 1.0 for objective in objectives]
    )


def to_losses(values: Mapping[str, float], objectives: Sequence[Objective]) -> Array:
    """Values by objective name, in the user's direction -> losses ``(objectives,)``."""
    return signs(objectives) * np.array(
        [values[objective.name] for objective in objectives], dtype=np.float64
    )


def nondominated(losses: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """A mask of the rows of ``(n, objectives)`` that no other row dominates, ``(n,)``.

    Equal rows do not dominate each other. Rows that are not finite are never on the front.
    """
    losses = np.asarray(losses, dtype=np.float64)
    mask = np.asarray(np.isfinite(losses).all(axis=1))
    if mask.any():
        import moocore

        mask[mask] = moocore.is_nondominated(losses[mask], keep_weakly=True)
    return mask


def front_ranks(losses: npt.ArrayLike) -> Array:
    """Number of the front that each row of ``(n, objectives)`` is on, ``(n,)``.

    The front of all has 0, that of the rest 1, and so on; rows that are not finite have infinity.
    """
    losses = np.asarray(losses, dtype=np.float64)
    finite = np.isfinite(losses).all(axis=1)
    ranks = np.full(len(losses), np.inf)
    if finite.any():
        import moocore

        ranks[finite] = moocore.pareto_rank(losses[finite])
    return ranks


def hypervolume(losses: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Volume that ``(n, objectives)`` dominates up to ``reference`` ``(objectives,)``.

    Rows that are not finite, or not better than the reference everywhere, add nothing.
    """
    losses = np.asarray(losses, dtype=np.float64)
    reference = np.asarray(reference, dtype=np.float64)
    inside = losses[(losses < reference).all(axis=1) & np.isfinite(losses).all(axis=1)]
    if not len(inside):
        return 0.0
    import moocore

    return float(moocore.hypervolume(inside, ref=reference))


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Maps the anchors' range of each loss to 0 (best anchor) .. 1 (worst anchor).

    Attributes:
        low: Best anchor's loss per objective, ``(objectives,)``.
        high: Worst anchor's, always above ``low``.
    """

    low: Array
    high: Array

    @classmethod
    def from_anchors(cls, losses: npt.ArrayLike) -> Normaliser:
        """A normaliser from the anchors' losses ``(anchors, objectives)``.

        Rows that are not finite are left out.

        Raises:
            StudyFailedError: If no anchor has finite losses.
        """
        losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
        finite = losses[np.isfinite(losses).all(axis=1)]
        if not finite.size:
            raise StudyFailedError(
                "expected at least one anchor with finite losses, received none; `mergesearch "
                "show` lists the failures"
            )
        low = finite.min(axis=0)
        high = finite.max(axis=0)
        # Anchors that all score the same define no range: the size of the loss itself is taken.
        size = np.where(low == 0, 1.0, np.abs(low))
        return cls(low, np.where(high - low > 1e-9 * size, high, low + size))

    @property
    def scale(self) -> Array:
        """``(objectives, 2)``: the losses that map to 0 and 1."""
        return np.stack([self.low, self.high], axis=1)

    @property
    def reference(self) -> Array:
        """Reference point of the hypervolume in normalised losses, ``(objectives,)``."""
        return np.full(self.low.shape, 1.0 + MARGIN)

    def normalise(self, losses: npt.ArrayLike) -> Array:
        """Losses ``(..., objectives)`` in units of the anchors' range."""
        return (np.asarray(losses, dtype=np.float64) - self.low) / (self.high - self.low)

    def scalarise(self, losses: npt.ArrayLike, weights: npt.ArrayLike) -> Array:
        """Weighted sum of the normalised losses: ``(..., objectives)`` -> ``(...)``."""
        return np.asarray(self.normalise(losses) @ np.asarray(weights, dtype=np.float64))

    def hypervolume(self, losses: npt.ArrayLike) -> float:
        """Volume that ``(n, objectives)`` dominates, in normalised losses.

        The best loss of any anchor in every objective has ``1.1 ** objectives``.
        """
        return hypervolume(self.normalise(losses), self.reference)

    def to_dict(self) -> dict[str, list[float]]:
        """JSON-able form."""
        return {"low": self.low.tolist(), "high": self.high.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[float]]) -> Normaliser:
        """Inverse of :meth:`to_dict`.

        Raises:
            InputError: If a key is missing or unknown, or a range is empty.
        """
        if set(data) != {"low", "high"}:
            raise InputError(f"normaliser: expected keys 'high' and 'low', received {sorted(data)}")
        low = np.asarray(data["low"], np.float64)
        high = np.asarray(data["high"], np.float64)
        if low.shape != high.shape or low.ndim != 1 or not np.all(high > low):
            raise InputError(
                f"normaliser: expected low < high per objective, received {data['low']}, "
                f"{data['high']}"
            )
        return cls(low, high)


@dataclass(eq=False)
class Front:
    """The front so far and its hypervolume, updated trial by trial.

    A trial costs one comparison with the members, and a small volume only if it joins: its
    exclusive share is its own box less what the members already cover of that box (While 2012, "A
    Fast Way of Calculating Exact Hypervolumes"). 5,000 trials take a fraction of a second.

    Attributes:
        scale: Normaliser of the study.
        numbers: Trials on the front, in order of arrival.
        history: Hypervolume after each added trial.
    """

    scale: Normaliser
    numbers: list[int] = field(default_factory=list)
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._members = np.empty((0, len(self.scale.low)))

    def add(self, number: int, losses: npt.ArrayLike) -> bool:
        """Add a trial's losses ``(objectives,)``, and say whether it joins the front.

        Losses that are not finite never do.
        """
        point = self.scale.normalise(losses)
        joins = bool(np.isfinite(point).all()) and not self._dominated(point)
        gain = self._exclusive(point) if joins else 0.0
        self.history.append(self.hypervolume + gain)
        if joins:
            stays = (self._members < point).any(axis=1) | (self._members == point).all(axis=1)
            self.numbers = [n for n, stay in zip(self.numbers, stays, strict=True) if stay] + [
                number
            ]
            self._members = np.vstack([self._members[stays], point])
        return joins

    @property
    def losses(self) -> Array:
        """Losses of the members, ``(members, objectives)``."""
        return self._members * (self.scale.high - self.scale.low) + self.scale.low

    @property
    def hypervolume(self) -> float:
        """Volume covered so far, in normalised losses."""
        return self.history[-1] if self.history else 0.0

    def _dominated(self, point: Array) -> bool:
        below = (self._members <= point).all(axis=1)
        return bool((below & (self._members < point).any(axis=1)).any())

    def _exclusive(self, point: Array) -> float:
        reference = self.scale.reference
        box = float(np.prod(np.maximum(reference - point, 0.0)))
        if box == 0.0 or not len(self._members):
            return box
        limited = np.maximum(self._members, point)
        return max(box - hypervolume(limited[nondominated(limited)], reference), 0.0)


def choose_leaders(
    losses: npt.ArrayLike, scalars: npt.ArrayLike, scale: Normaliser, count: int
) -> list[int]:
    """Up to ``count`` rows worth a second look, most important first.

    In order: the best scalarised, the best of each objective, then the members of the front that
    add most hypervolume to those already chosen (greedy subset selection), then the best scalarised
    of the rest. With one objective that is simply the best ``count``.

    Args:
        losses: ``(n, objectives)``; rows that are not finite are never chosen.
        scalars: Scalarised losses ``(n,)``, for ties and the rest.
        scale: Normaliser of the study.
        count: How many rows to choose at most.

    Returns:
        Row indices without repetition.
    """
    points = scale.normalise(losses)
    scalars = np.asarray(scalars, dtype=np.float64)
    front = [int(row) for row in np.flatnonzero(nondominated(points))]
    if not front:
        return []
    extremes = [
        min(front, key=lambda row: (points[row, m], scalars[row])) for m in range(points.shape[1])
    ]
    finite = np.flatnonzero(np.isfinite(points).all(axis=1))
    best = [int(row) for row in finite[np.argsort(scalars[finite], kind="stable")]]
    chosen = list(dict.fromkeys([best[0], *extremes]))[:count]
    # The reference lies behind all members, or a one-sided front would lose its far end.
    reference = np.maximum(scale.reference, points[front].max(axis=0) + MARGIN)
    rest = [row for row in front if row not in chosen]
    while rest and len(chosen) < count:
        gains = [hypervolume(points[[*chosen, row]], reference) for row in rest]
        chosen.append(rest.pop(int(np.argmax(gains))))
    chosen += [row for row in best if row not in chosen][: max(count - len(chosen), 0)]
    return chosen
