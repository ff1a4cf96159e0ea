"""The course of a study: the value of each trial, and the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.search.front import signs
from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.data import ReportData, label

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Progress:
    """Best so far, after each complete trial.

    Attributes:
        numbers: Trial numbers, ``(complete,)``.
        values: Value of each trial, in the user's direction (one objective) or as weighted score.
        best: Best value so far.
        errors: Standard error of the best value so far, NaN where unknown.
        anchors: Anchor name -> value.
        title: What the values are.
        higher_is_better: Direction of the values.
    """

    numbers: npt.NDArray[np.int64]
    values: Array
    best: Array
    errors: Array
    anchors: Mapping[str, float]
    title: str
    higher_is_better: bool


def progress(data: ReportData) -> Progress:
    """The course of the study: the objective if there is one, else the weighted score.

    The weighted score is 1 less the scalarised loss: 1 equals the best anchor in every objective, 0
    the worst.
    """
    complete = data.complete
    single = len(data.objectives) == 1
    values = complete.losses[:, 0] * signs(data.objectives)[0] if single else 1.0 - complete.scalars
    higher = not single or data.objectives[0].direction == "maximize"
    errors = np.array([_error(data, record) for record in complete.records])
    best = np.maximum.accumulate(values) if higher else np.minimum.accumulate(values)
    # The first trial that reached the current best is the one whose standard error counts.
    holder = np.maximum.accumulate(np.where(_improves(values, higher), np.arange(len(values)), 0))
    return Progress(
        numbers=np.array([record.number for record in complete.records], dtype=np.int64),
        values=values,
        best=best,
        errors=errors[holder] if len(errors) else errors,
        anchors={
            label(r): float(v)
            for r, v in zip(complete.records, values, strict=True)
            if r.kind == "anchor"
        },
        title=data.objectives[0].name if single else "weighted score",
        higher_is_better=higher,
    )


def _improves(values: Array, higher: bool) -> npt.NDArray[np.bool_]:
    """Which values are better than all before them, ``(complete,)``."""
    if not len(values):
        return np.zeros(0, dtype=np.bool_)
    values = values if higher else -values
    before = np.concatenate(([-np.inf], np.maximum.accumulate(values)[:-1]))
    return np.asarray(values > before)


def _error(data: ReportData, record: TrialSummary) -> float:
    """Standard error of a trial's progress value, NaN where it is unknown.

    Objectives count as independent.
    """
    errors = np.array([record.errors.get(o.name, np.nan) for o in data.objectives])
    if len(data.objectives) == 1:
        return float(errors[0])
    normaliser = data.complete.normaliser
    assert normaliser is not None
    slopes = np.asarray(data.weights) / (normaliser.high - normaliser.low)
    return float(np.sqrt(np.sum((slopes * errors) ** 2)))
