"""The merge that suits how important the objectives are, as the surrogate expects it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from mergesearch.merging import RunFolderError
from mergesearch.search.front import Normaliser, signs
from mergesearch.search.report.between.surrogate import (
    LEAST,
    LEAST_EXPLAINED,
    MOST_COORDINATES,
    Surrogate,
    fit_around,
)
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.kept import Between, Expected

Array = npt.NDArray[np.float64]

#: Most combinations of weights for which a page holds what is expected.
COMBINATIONS = 100
#: Most steps from no weight to all of it.
STEPS = 20


@dataclass(frozen=True, eq=False)
class Compromises:
    """What is needed to expect the best merge for any weights.

    Attributes:
        surrogate: Of the losses.
        normaliser: Units of the losses.
        points: Members of the recommended front ``(members, dim)``.
        losses: Theirs, normalised ``(members, objectives)``.
        signs: Factors from losses to values ``(objectives,)``.
    """

    surrogate: Surrogate
    normaliser: Normaliser
    points: Array
    losses: Array
    signs: Array

    def best(self, weights: Array) -> Array:
        """The point ``(dim,)`` that is expected to suit weights ``(objectives,)`` best.

        It lies in the box between the members of the front; the search begins at the member that
        suits best.
        """
        start = self.points[int(np.argmin(self.losses @ weights))]
        units = weights / np.diff(self.normaliser.scale, axis=1)[:, 0]
        return self.surrogate.best(units, start)

    def expected(self, weights: Array, point: Array, means: Sequence[float]) -> Expected:
        """What is expected of a point, in the user's directions."""
        losses, errors = self.surrogate.predict(point)
        return Expected(
            weights=tuple(weights.tolist()),
            values=tuple((self.signs * losses).tolist()),
            errors=tuple(errors.tolist()),
            means=tuple(means),
        )


def compromises(data: ReportData) -> Compromises | str:
    """What is needed to expect merges between trials, or in a sentence why nothing is expected."""
    normaliser = data.complete.normaliser
    if len(data.objectives) < 2 or normaliser is None:
        return "there are no objectives to weigh"
    rows = zip(data.complete.records, data.complete.losses, strict=True)
    with_point = {r.number: row for r, row in rows if np.isfinite(row).all()}
    records = [r for r in data.complete_records if r.point is not None and r.number in with_point]
    places = {record.number: place for place, record in enumerate(records)}
    members = np.array([places[n] for n in data.expected if n in places], dtype=np.intp)
    if len(records) < LEAST:
        return f"fewer than {LEAST} trials of the search are complete"
    points = np.array([record.point for record in records])
    if len(members) < 2 or not np.ptp(points[members], axis=0).any():
        return "the front has a single member"
    if points.shape[1] > MOST_COORDINATES:
        return f"the space has more than {MOST_COORDINATES} coordinates"
    surrogate = fit_around(points, np.array([with_point[r.number] for r in records]), members)
    useless = _useless(data, surrogate)
    if useless:
        return useless
    numbers = [records[place].number for place in members]
    losses = normaliser.normalise(np.array([data.expected[number] for number in numbers]))
    return Compromises(surrogate, normaliser, points[members], losses, signs(data.objectives))


def _useless(data: ReportData, surrogate: Surrogate) -> str:
    """Which objectives the surrogate cannot predict; empty where it predicts all."""
    blind = [
        f"{objective.name} (error {error:.2g}, spread {spread:.2g})"
        for objective, error, spread, explained in zip(
            data.objectives,
            surrogate.errors,
            surrogate.spreads,
            surrogate.explained,
            strict=True,
        )
        if explained < LEAST_EXPLAINED
    ]
    if not blind:
        return ""
    return (
        f"trials that were left out are predicted hardly better than by a mean: {', '.join(blind)}"
    )


def between(data: ReportData, directions: int) -> Between | None:
    """What is expected for combinations of weights; None with one objective.

    Args:
        data: Of a run, with points and what gives their mean coefficients.
        directions: Number of directions; other numbers of coefficients are left out.
    """
    if len(data.objectives) == 1 or data.means_at is None:
        return None
    with threadpool_limits(limits=1, user_api="blas"):  # its bits depend on the number
        found = compromises(data)
        if isinstance(found, str):
            return Between(why=found)
        expected = []
        for weights in combinations(len(data.objectives)):
            point = found.best(weights)
            means = data.means_at(point)
            known = means if len(means) == directions else ()
            expected.append(found.expected(weights, point, known))
    return Between(expected=tuple(expected))


def combinations(objectives: int) -> list[Array]:
    """Weights that sum to 1, evenly spaced ``(objectives,)``."""
    steps = STEPS
    while steps > 1 and comb(steps + objectives - 1, objectives - 1) > COMBINATIONS:
        steps -= 1
    shares = itertools.product(range(steps + 1), repeat=objectives - 1)
    kept = [share for share in shares if sum(share) <= steps]
    return [np.array([*share, steps - sum(share)]) / steps for share in kept]


def expected_at(data: ReportData, weights: Array) -> tuple[Array, Expected]:
    """The point that is expected to suit weights ``(objectives,)`` best, and its expectations.

    Raises:
        RunFolderError: If nothing can be expected.
    """
    with threadpool_limits(limits=1, user_api="blas"):  # its bits depend on the number
        found = compromises(data)
        if isinstance(found, str):
            raise RunFolderError(
                f"{data.run}: nothing is expected between trials: {found}; choose a measured one "
                "with `mergesearch show --prefer`"
            )
        weights = weights / weights.sum()
        point = found.best(weights)
        return point, found.expected(weights, point, ())
