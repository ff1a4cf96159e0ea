"""The trial of the front that suits how important the objectives are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective
from mergesearch.merging import InputError, RunFolderError
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.data import ReportData

Array = npt.NDArray[np.float64]


def preferred(data: ReportData, pairs: Sequence[str]) -> TrialSummary:
    """The member of the recommended front with the best weighted sum of objectives.

    Each objective is in units of the anchors' range. Values as estimated from all trials decide,
    and those on search items without estimates.

    Args:
        data: Of the run.
        pairs: ``NAME=WEIGHT``, the importance of objectives; those not named weigh nothing.

    Raises:
        InputError: If the pairs do not fit the objectives.
        RunFolderError: If no trial is complete.
    """
    preference = parse_preference(pairs, data.objectives)
    losses = data.expected if len(data.objectives) > 1 else _kept_bounds(data)
    normaliser = data.complete.normaliser
    if normaliser is None or not losses:
        raise RunFolderError(f"{data.run}: expected a complete trial, found none")
    weights = np.array([preference.get(objective.name, 0.0) for objective in data.objectives])
    numbers = sorted(losses)
    rows = np.array([losses[number] for number in numbers])
    scalars = normaliser.scalarise(rows, weights / weights.sum())
    return data.by_number[numbers[int(np.argmin(scalars))]]


def _kept_bounds(data: ReportData) -> dict[int, Array]:
    """Losses ``(objectives,)`` of the complete trials that keep all bounds."""
    complete = data.complete
    rows = zip(complete.records, complete.losses, strict=True)
    return {record.number: row for record, row in rows if record.feasible}


def parse_preference(
    pairs: Sequence[str], objectives: Sequence[Objective], option: str = "--prefer"
) -> dict[str, float]:
    """Parse ``NAME=WEIGHT`` pairs of an option.

    Raises:
        InputError: If a name is not one of the objectives, a weight is not a number, or all are
            zero.
    """
    names = [objective.name for objective in objectives]
    preference = {}
    for pair in pairs:
        name, _, text = pair.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = -1.0
        if name not in names or not 0 <= weight < float("inf"):
            raise InputError(
                f"{option} {pair}: expected NAME=WEIGHT with a name among {names} and a weight "
                "from 0 on"
            )
        preference[name] = weight
    if not any(preference.values()):
        raise InputError(f"{option}: expected a positive weight for at least one of {names}")
    return preference
