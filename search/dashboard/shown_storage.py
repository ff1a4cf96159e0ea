"""The storage that a dashboard reads: studies without what only the trial log needs of trials.

A point of 2,000 dimensions has 21 kB as text. Dashboards show none of it, but Optuna would read it
for each trial of a study, and keep it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Container, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from mergesearch.search.quiet import quiet_optuna
from mergesearch.search.record.journal import ReadJournal
from mergesearch.search.record.storage import Storage, database_of, read_storage
from mergesearch.search.record.table_reading import (
    CHUNK,
    attributes_between,
    intermediate_between,
    params_between,
    trial_rows,
    values_between,
)
from mergesearch.search.record.tables import local_time

if TYPE_CHECKING:
    import sqlalchemy as sa


def shown_storage(location: str | Path) -> Storage:
    """Open a storage for a dashboard; errors as of :func:`read_storage`."""
    if isinstance(location, Path) and location.is_file():
        with quiet_optuna():
            return JournalStorage(ReadJournal(location, "attributes"))
    storage = read_storage(location)
    database = database_of(storage)
    if database is None:
        return storage
    database.engine.dispose()
    return ShownDatabase(database)


class ShownDatabase(RDBStorage):
    """A database whose trials are read from its tables, each until it has ended.

    Args:
        database: The database, whose tables are known.
    """

    def __init__(self, database: RDBStorage) -> None:
        super().__init__(
            database.url,
            engine_kwargs=database.engine_kwargs,
            skip_compatibility_check=True,
            skip_table_creation=True,
        )
        self._known: dict[int, dict[int, FrozenTrial]] = {}  # study -> id -> ended trial
        self._reading = threading.Lock()

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """The trials of a study, without our own attributes.

        Raises:
            KeyError: If there is no such study.
        """
        trials = self._get_trials(study_id, states, set(), -1)
        return copy.deepcopy(trials) if deepcopy else trials

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """The trials of these ids, and all whose ids are higher.

        Studies of Optuna read a database through a cache of their own, which asks for trials so.
        """
        self.get_study_name_from_id(study_id)  # raises
        with self._reading, self.engine.connect() as connection:
            trials = self._trials(connection, study_id)
        return [
            trial
            for trial in trials
            if (trial._trial_id > trial_id_greater_than or trial._trial_id in included_trial_ids)
            and (states is None or trial.state in states)
        ]

    def _trials(self, connection: sa.Connection, study_id: int) -> list[FrozenTrial]:
        """The trials, of which those that have ended are kept."""
        known = self._known.setdefault(study_id, {})
        rows = trial_rows(connection, study_id)
        unknown = [row for row in rows if row.trial_id not in known]
        running: dict[int, FrozenTrial] = {}
        for start in range(0, len(unknown), CHUNK):
            for trial in _read(connection, study_id, unknown[start : start + CHUNK]):
                kept = known if trial.state.is_finished() else running
                kept[trial._trial_id] = trial
        return [known.get(row.trial_id) or running[row.trial_id] for row in rows]


def _read(
    connection: sa.Connection, study_id: int, rows: Sequence[sa.Row[Any]]
) -> list[FrozenTrial]:
    """The trials of some rows of their table."""
    ends = (study_id, rows[0].trial_id, rows[-1].trial_id)
    params = params_between(connection, *ends)
    values = values_between(connection, *ends)
    user = attributes_between(connection, *ends, ours=False, name="trial_user_attributes")
    system = attributes_between(connection, *ends, ours=False)
    steps = intermediate_between(connection, *ends)
    return [
        _frozen(
            row,
            params.get(row.trial_id, []),
            values=values.get(row.trial_id),
            user_attrs=user.get(row.trial_id, {}),
            system_attrs=system.get(row.trial_id, {}),
            intermediate_values=steps.get(row.trial_id, {}),
        )
        for row in rows
    ]


def _frozen(
    row: sa.Row[Any], params: Sequence[tuple[str, float, str]], **contents: Any
) -> FrozenTrial:
    distributions = {name: _distribution(text) for name, _, text in params}
    return FrozenTrial(
        number=row.number,
        trial_id=row.trial_id,
        state=TrialState[row.state],
        value=None,
        datetime_start=local_time(row.datetime_start),
        datetime_complete=local_time(row.datetime_complete),
        params={name: distributions[name].to_external_repr(value) for name, value, _ in params},
        distributions=distributions,
        **contents,
    )


@lru_cache(maxsize=1024)  # studies have few, and repeat them for every trial
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


class FewTrials(InMemoryStorage):
    """A storage of one study that seems to have a few of its trials alone.

    Args:
        study: The study as its storage has it.
        trials: The few.
    """

    def __init__(self, study: Any, trials: list[FrozenTrial]) -> None:
        super().__init__()
        self._study = study
        self._few = trials

    def get_all_studies(self) -> list[Any]:
        """The study."""
        return [self._study]

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """The few trials."""
        return [trial for trial in self._few if states is None or trial.state in states]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """Any trial: which are the best is found out among all of them."""
        return self._few[-1]
