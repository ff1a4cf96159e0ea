"""Trials as tables: plain rows, and frames of pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergesearch.evaluators import Objective
from mergesearch.merging import InputError
from mergesearch.search.record.trial_record import TrialRecord

Row = dict[str, Any]


def rows_of(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    coordinates: Sequence[str] = (),
) -> list[Row]:
    """One row for each trial: what it is, its values and standard errors, its time.

    Args:
        records: The trials.
        objectives: The study's.
        coordinates: Names of the coordinates, to add those of each trial; none to leave them out.
    """
    return [_row(record, objectives, coordinates) for record in records]


def _row(record: TrialRecord, objectives: Sequence[Objective], coordinates: Sequence[str]) -> Row:
    point = [None] * len(coordinates) if record.point is None else record.point.tolist()
    scores: dict[str, Any] = {}
    for objective in objectives:
        scores[objective.name] = record.values.get(objective.name)
        scores[f"{objective.name} error"] = record.errors.get(objective.name)
    return {
        "trial": record.number,
        "kind": record.kind,
        "name": record.name,
        "state": record.state,
        **scores,
        "seconds": sum(record.seconds.values()),
        "failure": None if record.failure is None else record.failure.message,
        **dict(zip(coordinates, point, strict=bool(coordinates))),
    }


def frame(rows: Sequence[Row], objectives: Sequence[Objective], coordinates: Sequence[str]) -> Any:
    """A ``pandas.DataFrame`` of rows, with the trial's number as its index.

    Args:
        rows: As :func:`rows_of` makes them.
        objectives, coordinates: As for :func:`rows_of`.

    Raises:
        InputError: If pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise InputError(
            "trials: expected pandas, which is not installed; `pip install pandas`, or ask for "
            "rows=True"
        ) from None
    scores = [name for o in objectives for name in (o.name, f"{o.name} error")]
    columns = ["trial", "kind", "name", "state", *scores, "seconds", "failure", *coordinates]
    return pandas.DataFrame(list(rows), columns=columns).set_index("trial")
