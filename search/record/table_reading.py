"""Reads trials from Optuna's tables, in a few statements for many trials."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mergesearch.search.record.attributes import TRIAL_KEYS
from mergesearch.search.record.storage import StorageAccess
from mergesearch.search.record.stored import StoredTrial
from mergesearch.search.record.tables import table, value_of

if TYPE_CHECKING:
    import sqlalchemy as sa

#: Trials that are read at a time; each may have tens of kilobytes.
CHUNK = 1000
UNFINISHED = ("RUNNING", "WAITING")


def read_tables(engine: sa.Engine, study_id: int, access: StorageAccess) -> Iterator[StoredTrial]:
    """Every trial of a study, by number."""

    def rows_of_study() -> Sequence[sa.Row[Any]]:
        with engine.connect() as connection:
            return trial_rows(connection, study_id)

    rows = access.read(rows_of_study)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        ends = (chunk[0].trial_id, chunk[-1].trial_id)
        values, attributes = access.read(partial(_contents, engine, study_id, *ends))
        for row in chunk:
            yield StoredTrial(
                row.trial_id,
                row.number,
                row.state not in UNFINISHED,
                values.get(row.trial_id),
                attributes.pop(row.trial_id, {}),
            )


def _contents(
    engine: sa.Engine, study_id: int, first: int, last: int
) -> tuple[dict[int, list[float]], dict[int, dict[str, Any]]]:
    """Values and attributes of ours of the trials of a study from one id to another, by id."""
    with engine.connect() as connection:
        return (
            values_between(connection, study_id, first, last),
            attributes_between(connection, study_id, first, last, ours=True),
        )


def trial_rows(connection: sa.Connection, study_id: int, after: int = -1) -> Sequence[sa.Row[Any]]:
    """Rows of the trials of a study whose ids are higher, by id; numbers grow with them."""
    import sqlalchemy as sa

    trials = table("trials")
    wanted = (trials.c.study_id == study_id) & (trials.c.trial_id > after)
    return connection.execute(sa.select(trials).where(wanted).order_by(trials.c.trial_id)).all()


def attributes_of_ids(connection: sa.Connection, ids: Sequence[int], key: str) -> dict[int, str]:
    """Id -> JSON text of an attribute of a few trials, of those that have it."""
    import sqlalchemy as sa

    columns = table("trial_system_attributes").c
    query = sa.select(columns.trial_id, columns.value_json)
    rows = connection.execute(query.where(columns.trial_id.in_(ids) & (columns.key == key)))
    return {row.trial_id: row.value_json for row in rows}


def values_between(
    connection: sa.Connection, study_id: int, first: int, last: int
) -> dict[int, list[float]]:
    """Id -> values ``(objectives,)`` of the trials of a study from one id to another."""
    columns = table("trial_values").c
    query = _between("trial_values", ["value", "value_type"], study_id, first, last)
    known: dict[int, list[float]] = defaultdict(list)
    ordered = query.order_by(columns.trial_id, columns.objective)
    for trial_id, value, kind in connection.execute(ordered).all():  # one by one costs more
        known[trial_id].append(value_of(value, kind))
    return dict(known)


def attributes_between(
    connection: sa.Connection,
    study_id: int,
    first: int,
    last: int,
    *,
    ours: bool,
    name: str = "trial_system_attributes",
) -> dict[int, dict[str, Any]]:
    """Id -> attributes of the trials of a study from one id to another.

    Args:
        connection: To the database.
        study_id: The study's id.
        first: The lowest id of a trial.
        last: The highest one.
        ours: Whether those of the record are read, or all others.
        name: Of the table.
    """
    own = table(name).c.key.in_(TRIAL_KEYS)
    query = _between(name, ["key", "value_json"], study_id, first, last)
    known: dict[int, dict[str, Any]] = defaultdict(dict)
    for trial_id, key, text in connection.execute(query.where(own if ours else ~own)).all():
        known[trial_id][key] = json.loads(text)
    return dict(known)


def params_between(
    connection: sa.Connection, study_id: int, first: int, last: int
) -> dict[int, list[tuple[str, float, str]]]:
    """Id -> names, values and distributions of parameters, in the order of their writing."""
    names = ["param_name", "param_value", "distribution_json"]
    query = _between("trial_params", names, study_id, first, last)
    known: dict[int, list[tuple[str, float, str]]] = defaultdict(list)
    ordered = query.order_by(table("trial_params").c.param_id)
    for trial_id, param, value, text in connection.execute(ordered).all():
        known[trial_id].append((param, value, text))
    return dict(known)


def intermediate_between(
    connection: sa.Connection, study_id: int, first: int, last: int
) -> dict[int, dict[int, float]]:
    """Id -> step -> value of the trials of a study from one id to another."""
    names = ["step", "intermediate_value", "intermediate_value_type"]
    known: dict[int, dict[int, float]] = defaultdict(dict)
    for trial_id, step, value, kind in connection.execute(
        _between("trial_intermediate_values", names, study_id, first, last)
    ).all():
        known[trial_id][step] = value_of(value, kind)
    return dict(known)


def _between(
    name: str, columns: Sequence[str], study_id: int, first: int, last: int
) -> sa.Select[Any]:
    """Columns of a table that belong to the trials of a study from one id to another."""
    import sqlalchemy as sa

    trials = table("trials")
    own = table(name)
    wanted = (trials.c.study_id == study_id) & own.c.trial_id.between(first, last)
    return (
        sa.select(own.c.trial_id, *(own.c[column] for column in columns))
        .join(trials, trials.c.trial_id == own.c.trial_id)
        .where(wanted)
    )
