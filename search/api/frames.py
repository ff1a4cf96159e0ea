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
            One that is also the name of another column, as that of an expert may be the name of an
            objective, is called a coefficient.
    """
    columns = _columns(objectives, coordinates)[len(_columns(objectives, ())) :]
    return [_row(record, objectives, columns) for record in records]


def _columns(objectives: Sequence[Objective], coordinates: Sequence[str]) -> list[str]:
    """Names of all columns, each of which is another."""
    scores = [name for o in objectives for name in (o.name, f"{o.name} error")]
    plain = ["trial", "kind", "name", "state", *scores, "seconds", "failure", "same as"]
    return plain + [f"{name} coefficient" if name in plain else name for name in coordinates]


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
        "same as": record.same_as,
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
    columns = _columns(objectives, coordinates)
    return pandas.DataFrame(list(rows), columns=columns).set_index("trial")
