"""The front that a study recommends: chosen by losses that are estimated from all trials.

The observed front holds what was lucky. Members that are chosen by estimates
(:mod:`mergesearch.search.front_estimate`) are worth more on other items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective
from mergesearch.search.front import nondominated, to_losses
from mergesearch.search.front_estimate import estimated_around
from mergesearch.search.record.trial_record import TrialRecord

Array = npt.NDArray[np.float64]


def estimated_trials(
    records: Sequence[TrialRecord], objectives: Sequence[Objective]
) -> dict[int, Array]:
    """Trial -> estimated losses ``(objectives,)``, of the observed front and what lies around it.

    Up to 500 trials have an estimate, which takes 0.2 s of CPU for two objectives. None has one
    with a single objective, where standard errors are not known, or with too few trials.
    """
    complete = [r for r in records if r.state == "complete" and r.point is not None]
    kept = np.array([record.feasible for record in complete], dtype=bool)
    if len(objectives) == 1 or not kept.any():
        return {}
    losses = np.array([to_losses(record.values, objectives) for record in complete])
    errors = [[record.errors.get(o.name, np.nan) for o in objectives] for record in complete]
    members = np.flatnonzero(kept)[nondominated(losses[kept])]
    if not len(members):
        return {}
    points = np.array([record.point for record in complete])
    around = estimated_around(points, losses, np.array(errors), members)
    if around is None:
        return {}
    return {complete[row].number: each for row, each in zip(*around, strict=True)}


def estimated_front(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    estimates: Mapping[int, Array],
) -> tuple[int, ...]:
    """Numbers of the trials that no other one dominates by the estimates; none without estimates.

    Trials without a point in the space, such as experts, count by their observed losses.
    """
    losses = {
        record.number: estimates.get(record.number, to_losses(record.values, objectives))
        for record in records
        if record.state == "complete" and record.feasible and has_estimate(record, estimates)
    }
    if not estimates or not losses:
        return ()
    front = nondominated(np.array([*losses.values()]))
    return tuple(number for number, member in zip(losses, front, strict=True) if member)


def has_estimate(record: TrialRecord, estimates: Mapping[int, Array]) -> bool:
    """Whether a trial is estimated, or needs no estimate because it lies outside the space."""
    return record.point is None or record.number in estimates
