"""Trials of a study in PostgreSQL: what a round records goes to Optuna's tables in one statement.

A round is what the driver records before it hands out work: results, and the trials that are asked
after them. It is one transaction, sent at once, so that it costs one answer of the server, and all
of it is there or nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.search.record.attributes import ASKED, RESULT
from mergesearch.search.record.optuna_trials import another_asked, another_told
from mergesearch.search.record.storage import StorageAccess, StorageAway
from mergesearch.search.record.stored import AskedTrial, StoredTrial, ToldTrial
from mergesearch.search.record.table_reading import attributes_of_ids, read_tables, trial_rows
from mergesearch.search.record.tables import distribution_text, json_text, moment, stored_value

if TYPE_CHECKING:
    import sqlalchemy as sa

#: Optuna locks the row too: whoever adds trials to the study by other ways has to wait.
LOCK = "SELECT study_id FROM studies WHERE study_id = %(study)s FOR UPDATE"
#: Writes a round, unless trials were added since the last one, or a trial has a result already.
ROUND = f"""
WITH free AS (
    SELECT WHERE NOT EXISTS (
        SELECT FROM trials WHERE study_id = %(study)s AND trial_id > %(last)s
    ) AND NOT EXISTS (
        SELECT FROM trials WHERE trial_id = ANY(%(told)s::int[]) AND state <> 'RUNNING'
    )
), asked AS (
    INSERT INTO trials (study_id, number, state, datetime_start)
    SELECT %(study)s, number, 'RUNNING', %(now)s FROM free, unnest(%(asked)s::int[]) AS number
    RETURNING trial_id, number
), params AS (
    INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT asked.trial_id, name, value, text FROM asked JOIN unnest(
        %(param_of)s::int[], %(param_names)s::text[], %(param_values)s::float8[],
        %(param_texts)s::text[]
    ) AS new (number, name, value, text) USING (number)
), notes AS (
    INSERT INTO trial_user_attributes (trial_id, key, value_json)
    SELECT asked.trial_id, key, text FROM asked JOIN unnest(
        %(note_of)s::int[], %(note_keys)s::text[], %(note_texts)s::text[]
    ) AS new (number, key, text) USING (number)
), texts AS (
    INSERT INTO trial_system_attributes (trial_id, key, value_json)
    SELECT asked.trial_id, '{ASKED}', text FROM asked JOIN unnest(
        %(asked)s::int[], %(asked_texts)s::text[]
    ) AS new (number, text) USING (number)
), ended AS (
    UPDATE trials SET state = new.state::trialstate, datetime_complete = %(now)s
    FROM free, unnest(%(told)s::int[], %(states)s::text[]) AS new (id, state)
    WHERE trial_id = new.id
    RETURNING trial_id
), results AS (
    INSERT INTO trial_system_attributes (trial_id, key, value_json)
    SELECT trial_id, key, text FROM ended JOIN unnest(
        %(result_of)s::int[], %(result_keys)s::text[], %(result_texts)s::text[]
    ) AS new (trial_id, key, text) USING (trial_id)
    ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json
), scores AS (
    INSERT INTO trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, objective, value, kind::trialvaluetype FROM ended JOIN unnest(
        %(value_of)s::int[], %(objectives)s::int[], %(values)s::float8[], %(kinds)s::text[]
    ) AS new (trial_id, objective, value, kind) USING (trial_id)
)
SELECT (SELECT count(*) FROM free), ARRAY(SELECT trial_id FROM asked ORDER BY number)
"""


class PostgresTrials:
    """Trials of one study, written round by round.

    Args:
        engine: The database, whose tables are known (:mod:`mergesearch.search.record.tables`),
            through psycopg.
        study_id: The study's id there.
        access: How the database is read and written.
    """

    def __init__(self, engine: sa.Engine, study_id: int, access: StorageAccess) -> None:
        self._engine = engine
        self._study_id = study_id
        self._access = access
        self._connection: sa.PoolProxiedConnection | None = None  # that rounds are sent by
        self._asked: list[AskedTrial] = []
        self._told: list[ToldTrial] = []
        self._depth = 0  # of nested batches
        self.ids: list[int] = []

    @property
    def settled(self) -> bool:
        """Whether everything that was written is recorded."""
        return not (self._asked or self._told)

    def read(self) -> Iterator[StoredTrial]:
        """Every trial, by number."""
        for trial in read_tables(self._engine, self._study_id, self._access):
            self.ids.append(trial.id)
            yield trial

    def ask(self, trial: AskedTrial) -> None:
        """Record the next trial as running, now or at the end of the round.

        Raises:
            StudyFailedError: If another driver has recorded a trial in its place.
        """
        self._asked.append(trial)
        self._end_round()

    def tell(self, trial: ToldTrial) -> None:
        """Record the result of a running trial, now or at the end of the round.

        Raises:
            StudyFailedError: If another driver has recorded another result.
        """
        if trial.number >= len(self.ids):
            self.flush()  # a round tells trials that were there before it
        self._told.append(trial)
        self._end_round()

    def set_asked(self, number: int, text: str) -> None:
        """Record again what a running trial was asked."""
        self.flush()
        values = {"id": self.ids[number], "key": ASKED, "text": json_text(text)}

        def attempt() -> None:
            import sqlalchemy as sa

            with self._engine.begin() as connection:
                connection.execute(
                    sa.text(
                        "UPDATE trial_system_attributes SET value_json = :text "
                        "WHERE trial_id = :id AND key = :key"
                    ),
                    values,
                )

        self._access.write(attempt)

    @contextlib.contextmanager
    def batched_writes(self) -> Iterator[None]:
        """What is written inside is one round."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._end_round()

    def flush(self) -> None:
        """Record what waits for the end of the round."""
        if self._asked or self._told:
            self.ids += self._access.write(self._write_round)
            self._asked.clear()
            self._told.clear()

    def close(self) -> None:
        """Close the connections to the server; whoever reads opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._engine.dispose()

    def _end_round(self) -> None:
        if not self._depth:
            self.flush()

    def _write_round(self) -> list[int]:
        """Ids of the trials that the round asks.

        Raises:
            StorageAway: If the server cannot be reached; the round may be there nevertheless.
            StudyFailedError: If another driver writes the study.
        """
        parameters = self._parameters()
        fresh = self._connection is None
        try:
            written, ids = self._send(parameters)
        except StorageAway:
            if fresh:
                raise
            written, ids = self._send(parameters)  # the connection may have broken while idle
        return ids if written else self._written_before()

    def _send(self, parameters: Mapping[str, Any]) -> tuple[int, list[int]]:
        """Send a round: whether it was written, and the ids of the trials that it asks."""
        import psycopg

        try:
            if self._connection is None:
                self._connection = self._engine.raw_connection()
            connection: Any = self._connection.driver_connection
            # All of it is sent before the first answer is waited for. The ways that psycopg has to
            # begin and to commit would wait for answers to these.
            connection.autocommit = True
            with connection.pipeline():
                connection.execute("BEGIN")
                connection.execute(LOCK, parameters)
                cursor = connection.execute(ROUND, parameters)
                connection.execute("COMMIT")
            row: tuple[int, list[int]] = cursor.fetchone()
            return row
        except BaseException as error:
            if self._connection is not None:
                self._connection.invalidate()  # whatever it was in the middle of
            self._connection = None
            if isinstance(error, psycopg.Error):
                raise StorageAway(str(error)) from error
            raise

    def _written_before(self) -> list[int]:
        """Ids of the trials of this round, which is there already.

        A connection that broke after the commit has left it behind.

        Raises:
            StudyFailedError: If other trials or results are in its place.
        """
        told = {self.ids[each.number]: json_text(each.attributes[RESULT]) for each in self._told}
        with self._engine.connect() as connection:
            if attributes_of_ids(connection, list(told), RESULT) != told:
                raise another_told()
            last = self.ids[-1] if self.ids else -1
            ids = [row.trial_id for row in trial_rows(connection, self._study_id, last)]
            texts = attributes_of_ids(connection, ids, ASKED)
        if [texts.get(each) for each in ids] != [json_text(each.text) for each in self._asked]:
            first = self._asked[0].number if self._asked else len(self.ids)
            raise another_asked(first)
        return ids

    def _parameters(self) -> dict[str, Any]:
        """The round, column by column."""
        told = [(self.ids[each.number], each) for each in self._told]
        params = [row for each in self._asked for row in _param_rows(each)]
        notes = [
            (each.number, key, json_text(value))
            for each in self._asked
            for key, value in each.notes.items()
        ]
        results = [
            (trial_id, key, json_text(value))
            for trial_id, each in told
            for key, value in each.attributes.items()
        ]
        values = [
            (trial_id, index, *stored_value(value))
            for trial_id, each in told
            for index, value in enumerate(each.values or ())
        ]
        return {
            "study": self._study_id,
            "last": self.ids[-1] if self.ids else -1,
            "now": moment(),
            "asked": array_text(each.number for each in self._asked),
            "asked_texts": array_text(json_text(each.text) for each in self._asked),
            "told": array_text(trial_id for trial_id, _ in told),
            "states": array_text(each.state for each in self._told),
            **_columns(("param_of", "param_names", "param_values", "param_texts"), params),
            **_columns(("note_of", "note_keys", "note_texts"), notes),
            **_columns(("result_of", "result_keys", "result_texts"), results),
            **_columns(("value_of", "objectives", "values", "kinds"), values),
        }


def can_pipeline(engine: sa.Engine) -> bool:
    """Whether rounds can be sent to a database: it needs psycopg 3, and libpq 14."""
    if engine.driver != "psycopg":
        return False
    import psycopg

    return bool(psycopg.Pipeline.is_supported())


def _param_rows(trial: AskedTrial) -> list[tuple[Any, ...]]:
    text = distribution_text(*trial.bounds)
    return [(trial.number, name, value, text) for name, value in trial.params.items()]


def _columns(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, str]:
    """Rows as arrays by column."""
    columns = zip(*rows, strict=True) if rows else ((),) * len(names)
    return {name: array_text(column) for name, column in zip(names, columns, strict=True)}


def array_text(values: Iterable[str | float | None]) -> str:
    """Values as PostgreSQL writes an array.

    psycopg writes lists too, but looks at each value three times: of a round of one trial that
    would be a third of the time.
    """
    return f"{{{','.join(map(_element, values))}}}"


def _element(value: str | float | None) -> str:
    if value is None:
        return "NULL"
    if not isinstance(value, str):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
