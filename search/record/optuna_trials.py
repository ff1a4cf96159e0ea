"""Trials of a study written through Optuna's own storage, one by one, to any database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from mergesearch.merging import StudyFailedError
from mergesearch.search.record.attributes import ASKED, RESULT
from mergesearch.search.record.storage import Storage, StorageAccess
from mergesearch.search.record.stored import AskedTrial, StoredTrial, ToldTrial
from mergesearch.search.record.table_reading import read_tables

if TYPE_CHECKING:
    import optuna
    import sqlalchemy as sa


class OptunaTrials:
    """Trials of one study, written one after the other.

    Args:
        storage: An Optuna storage.
        study_id: The study's id there.
        access: How the storage is read and written.
        engine: The database, where its tables are known.
    """

    def __init__(
        self,
        storage: Storage,
        study_id: int,
        access: StorageAccess,
        engine: sa.Engine | None = None,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._study_id = study_id
        self._access = access
        self.ids: list[int] = []

    @property
    def settled(self) -> bool:
        """Whether everything that was written is recorded: it is at once."""
        return True

    def read(self) -> Iterator[StoredTrial]:
        """Every trial, by number."""
        known = (
            None
            if self._engine is None
            else read_tables(self._engine, self._study_id, self._access)
        )
        for trial in self._all_trials() if known is None else known:
            self.ids.append(trial.id)
            yield trial

    def ask(self, trial: AskedTrial) -> None:
        """Record the next trial as running.

        Raises:
            StudyFailedError: If another driver has recorded a trial in its place.
        """
        storage = self._storage
        frozen = _frozen(trial)
        tried = False

        def attempt() -> int:
            nonlocal tried
            # A connection that broke after the commit has left the trial behind.
            exists = tried and storage.get_n_trials(self._study_id) > trial.number
            tried = True
            if exists:
                trial_id = storage.get_trial_id_from_study_id_trial_number(
                    self._study_id, trial.number
                )
                ours = storage.get_trial(trial_id).system_attrs.get(ASKED) == trial.text
            else:
                trial_id = storage.create_new_trial(self._study_id, template_trial=frozen)
                ours = storage.get_trial_number_from_id(trial_id) == trial.number
            if not ours:
                raise another_asked(trial.number)
            return trial_id

        self.ids.append(self._access.write(attempt))

    def tell(self, trial: ToldTrial) -> None:
        """Record the attributes of a result, and last the state, which commits them.

        Raises:
            StudyFailedError: If another driver has recorded another result.
        """
        import optuna

        storage = self._storage
        trial_id = self.ids[trial.number]
        values = None if trial.values is None else list(trial.values)

        def attempt() -> None:
            try:
                for key, value in trial.attributes.items():
                    storage.set_trial_system_attr(trial_id, key, value)
                state = optuna.trial.TrialState[trial.state]
                storage.set_trial_state_values(trial_id, state, values)
            except optuna.exceptions.UpdateFinishedTrialError:
                # A connection that broke after the commit: this very result is recorded already.
                recorded = storage.get_trial(trial_id).system_attrs.get(RESULT)
                if recorded != trial.attributes[RESULT]:
                    raise another_told() from None

        self._access.write(attempt)

    def set_asked(self, number: int, text: str) -> None:
        """Record again what a running trial was asked."""
        trial_id = self.ids[number]
        self._access.write(lambda: self._storage.set_trial_system_attr(trial_id, ASKED, text))

    def batched_writes(self) -> AbstractContextManager[None]:
        """What is written inside; there is no way to write it together."""
        return nullcontext()

    def flush(self) -> None:
        """Record what waits: nothing does."""

    def close(self) -> None:
        """Release what only a writer needs: there is nothing."""

    def _all_trials(self) -> Iterator[StoredTrial]:
        trials = self._access.read(
            lambda: self._storage.get_all_trials(self._study_id, deepcopy=False)
        )
        for trial in trials:
            yield StoredTrial(
                trial._trial_id,  # which has no public way
                trial.number,
                trial.state.is_finished(),
                trial.values,
                trial.system_attrs,
            )


def another_asked(number: int) -> StudyFailedError:
    """The error of a driver that finds a trial which is not its own."""
    return StudyFailedError(
        f"storage: expected trial {number} to be this driver's, found another's; stop the other "
        "driver of this study and run the same command again"
    )


def another_told() -> StudyFailedError:
    """The error of a driver that finds a result which is not its own."""
    return StudyFailedError(
        "storage: expected a running trial, found one that another driver has finished; run the "
        "same command again"
    )


def _frozen(trial: AskedTrial) -> optuna.trial.FrozenTrial:
    """The Optuna trial of one that is asked."""
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    return create_trial(
        state=TrialState.RUNNING,
        params=dict(trial.params),
        distributions={key: FloatDistribution(*trial.bounds) for key in trial.params},
        user_attrs=dict(trial.notes),
        system_attrs={ASKED: trial.text},
    )
