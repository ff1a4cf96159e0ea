"""The durable record of a study, on Optuna storage.

Each trial is one Optuna trial, written RUNNING *before* any work and finished with its result; the
trial's state is the commit point, so after a crash a trial either has its result or is run again.
The exact point travels as one base64 system attribute (never one Optuna parameter per coefficient:
see ``docs/decisions/0002-trial-log.md``); at most 16 summary parameters make the dashboard's plots
meaningful. Only the driver writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective
from mergesearch.merging import Recipe, RunFolderError, StudyFailedError
from mergesearch.search.fidelity.rules import Estimates
from mergesearch.search.quiet import quiet_optuna
from mergesearch.search.record.attributes import ASKED, RESULT
from mergesearch.search.record.journal_lines import naming_the_line
from mergesearch.search.record.shown import Shown
from mergesearch.search.record.storage import (
    Storage,
    StorageAccess,
    batched_writes,
    journal_of,
)
from mergesearch.search.record.study_attributes import StudyAttributes, study_id_of
from mergesearch.search.record.study_results import StudyResults
from mergesearch.search.record.trial_record import Kind, TrialRecord, finished_record
from mergesearch.search.record.trial_text import (
    as_recorded,
    asked_text,
    read_asked,
    read_result,
    result_attributes,
)
from mergesearch.search.retry import RetryPolicy
from mergesearch.search.workers.messages import Outcome

if TYPE_CHECKING:
    import optuna

#: Digits of a recipe's digest that dashboards show.
SHOWN_DIGITS = 12


class TrialLog:
    """Trials of one study, in memory and on disk.

    Args:
        storage: An Optuna storage (see :func:`mergesearch.search.record.storage.open_storage`).
        name: Name of the study in it.
        objectives: Names and directions, recorded at creation.
        decode: Point -> recipe, to rebuild the records of search trials.
        template: The study's recipe; anchors record their field, and their operator where it is
            another.
        keep_fields: Record the field of every trial, for spaces that need weights to decode a
            point.
        create: Create the study if the storage does not hold it; otherwise that is an error.
        retry: How long to wait for a storage that is away; default not at all.
        guard: Called before every write; raises where this process may not write.

    Attributes:
        records: Every trial, by number; a trial is replaced by another record when it finishes.
        results: References, scores and verdict of the study.
        shown: What dashboards show of the study beside its trials.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        objectives: Sequence[Objective],
        decode: Callable[[npt.NDArray[np.float64]], Recipe],
        template: Recipe,
        *,
        keep_fields: bool = False,
        create: bool = True,
        retry: RetryPolicy | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage = storage
        self._access = StorageAccess(retry or RetryPolicy(0), guard)
        self._keep_fields = keep_fields
        self._objectives = tuple(objectives)
        self._decode = decode
        self._template = template
        self._study_id = self._access.read(lambda: _open_study(storage, name, objectives, create))
        self._trial_ids: dict[int, int] = {}
        self.records: list[TrialRecord] = []
        naming_the_line(journal_of(storage), self._read_all)
        self._attributes = StudyAttributes(storage, self._study_id, self._access)
        self.results = StudyResults(self._attributes, self.records)
        self.shown = Shown(storage, self._study_id, self._access, self._trial_ids)

    def ask(
        self,
        kind: Kind,
        recipe: Recipe,
        *,
        name: str = "",
        point: npt.NDArray[np.float64] | None = None,
        suggestion: int | None = None,
        tells_at_ask: int = 0,
        item_count: int | None = None,
        gradient_items: int = 0,
        retry_of: int | None = None,
        notes: Mapping[str, float] | None = None,
        summary: Mapping[str, float],
        bounds: tuple[float, float],
    ) -> TrialRecord:
        """Record a trial as RUNNING, in one storage operation, before any work is done for it.

        Args:
            kind, recipe, name, point, suggestion, tells_at_ask: As in :class:`TrialRecord`.
            item_count, gradient_items, retry_of: As in :class:`TrialRecord`.
            notes: Named numbers that dashboards show as user attributes.
            summary: Named numbers that dashboards plot as parameters.
            bounds: Lowest and highest of the coordinates.
        """
        record = TrialRecord(
            number=len(self.records),
            kind=kind,
            name=name,
            suggestion=suggestion,
            point=point,
            recipe=recipe,
            tells_at_ask=tells_at_ask,
            tell_index=None,
            state="running",
            item_count=item_count,
            gradient_items=gradient_items,
            retry_of=retry_of,
        )
        text = asked_text(record, self._template, keep_field=self._keep_fields)
        trial = _running_trial(record, text, notes or {}, summary, bounds)
        self._trial_ids[record.number] = self._create(record.number, trial)
        self.records.append(record)
        return record

    def tell(
        self,
        number: int,
        outcome: Outcome,
        tell_index: int | None,
        estimates: Estimates | None = None,
    ) -> TrialRecord:
        """Record the result of a running trial; setting the state comes last and commits it.

        Args:
            number: The trial's number.
            outcome: Its result.
            tell_index: Its position in the order of tells; None where no strategy learns from it.
            estimates: What a trial that a rule stopped would have scored on all items.
        """
        from optuna.trial import TrialState

        outcome = as_recorded(outcome)
        measurement = outcome.measurement
        record = self.records[number]
        item_count = record.item_count if outcome.stopped is None else outcome.stopped
        finished = round(time.time(), 3)
        estimates = estimates or Estimates()
        attributes = result_attributes(outcome, tell_index, item_count, finished, estimates)
        state = TrialState.FAIL
        values = None
        if measurement is not None:
            # Some items are not all: dashboards would rank the trial beside complete ones.
            state = TrialState.COMPLETE if item_count is None else TrialState.PRUNED
        if measurement is not None and item_count is None:
            values = [float(measurement.values[objective.name]) for objective in self._objectives]
        with self.batched_writes():
            self._access.write(
                lambda: self._finish(self._trial_ids[number], attributes, state, values)
            )
        self.records[number] = finished_record(record, outcome, tell_index, finished, estimates)
        return self.records[number]

    def restore(self, number: int, asked: TrialRecord) -> TrialRecord:
        """Record again what a running trial was asked, whose record was lost.

        Args:
            number: The trial's number.
            asked: The trial as a replay asks it.
        """
        text = asked_text(asked, self._template, keep_field=self._keep_fields)
        trial_id = self._trial_ids[number]
        self._access.write(lambda: self._storage.set_trial_system_attr(trial_id, ASKED, text))
        self.records[number] = asked
        return asked

    def set_attr(self, key: str, value: Any) -> None:
        """Record a JSON-able fact of the study."""
        self._attributes.set(key, value)

    def get_attr(self, key: str) -> Any:
        """A fact recorded by :meth:`set_attr`, or None."""
        return self._attributes.get(key)

    def batched_writes(self) -> AbstractContextManager[None]:
        """Writes inside reach the disk at once, at the end; only a journal has such a way."""
        return batched_writes(self._storage)

    def _create(self, number: int, trial: optuna.trial.FrozenTrial) -> int:
        """Id of the new trial of this number."""
        storage = self._storage
        tried = False

        def attempt() -> int:
            nonlocal tried
            # A connection that broke after the commit has left the trial behind.
            exists = tried and storage.get_n_trials(self._study_id) > number
            tried = True
            if exists:
                trial_id = storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
                recorded = storage.get_trial(trial_id).system_attrs.get(ASKED)
                ours = recorded == trial.system_attrs[ASKED]
            else:
                trial_id = storage.create_new_trial(self._study_id, template_trial=trial)
                ours = storage.get_trial_number_from_id(trial_id) == number
            if not ours:
                raise StudyFailedError(
                    f"storage: expected trial {number} to be this driver's, found another's; stop "
                    "the other driver of this study and run the same command again"
                )
            return trial_id

        return self._access.write(attempt)

    def _finish(
        self,
        trial_id: int,
        attributes: Mapping[str, Any],
        state: optuna.trial.TrialState,
        values: list[float] | None,
    ) -> None:
        """Write the attributes, and last the state, which commits them."""
        import optuna

        storage = self._storage
        try:
            for key, value in attributes.items():
                storage.set_trial_system_attr(trial_id, key, value)
            storage.set_trial_state_values(trial_id, state, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            # A connection that broke after the commit: this very result is recorded already.
            if storage.get_trial(trial_id).system_attrs.get(RESULT) != attributes[RESULT]:
                raise StudyFailedError(
                    "storage: expected a running trial, found one that another driver has "
                    "finished; run the same command again"
                ) from None

    def _read_all(self) -> None:
        """Read every trial of the storage."""
        trials = self._access.read(
            lambda: self._storage.get_all_trials(self._study_id, deepcopy=False)
        )
        for trial in trials:
            self._trial_ids[trial.number] = trial._trial_id
            self.records.append(self._read(trial))

    def _read(self, trial: optuna.trial.FrozenTrial) -> TrialRecord:
        attributes = trial.system_attrs
        where = f"{journal_of(self._storage) or 'storage'}: trial {trial.number}"
        record = read_asked(trial.number, attributes, self._template, self._decode, where)
        if not trial.state.is_finished():
            return record
        names = [objective.name for objective in self._objectives]
        return read_result(record, attributes, names, trial.values, where)


def _running_trial(
    record: TrialRecord,
    text: str,
    notes: Mapping[str, float],
    summary: Mapping[str, float],
    bounds: tuple[float, float],
) -> optuna.trial.FrozenTrial:
    """The Optuna trial of a record; ``text`` is what is recorded of it."""
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    # Rounded for people; the exact point is in the text.
    finite = {key: float(f"{value:.6g}") for key, value in summary.items() if np.isfinite(value)}
    low = min(bounds[0], *finite.values()) if finite else bounds[0]
    high = max(bounds[1], *finite.values()) if finite else bounds[1]
    # The dashboard shows these as columns, and sends them whole to every viewer.
    about: dict[str, Any] = {
        "kind": record.kind,
        **({"name": record.name} if record.name else {}),
        "recipe": record.recipe.digest[:SHOWN_DIGITS],
    }
    if record.retry_of is not None:
        about["retry of"] = record.retry_of
    return create_trial(
        state=TrialState.RUNNING,
        params=finite,
        distributions={key: FloatDistribution(low, high) for key in finite},
        user_attrs=about | {key: float(f"{value:.4g}") for key, value in notes.items()},
        system_attrs={ASKED: text},
    )


def _open_study(storage: Storage, name: str, objectives: Sequence[Objective], create: bool) -> int:
    """Id of the study, created if need be and allowed."""
    try:
        return study_id_of(storage, name)
    except RunFolderError:
        if not create:
            raise
        return _create_study(storage, name, objectives)


def _create_study(storage: Storage, name: str, objectives: Sequence[Objective]) -> int:
    """Id of a new study with its directions and metric names."""
    import optuna

    with quiet_optuna():
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[objective.direction for objective in objectives],
            # Never asked; the default sampler would import more.
            sampler=optuna.samplers.RandomSampler(seed=0),
        )
        study.set_metric_names([objective.name for objective in objectives])
    return int(study._study_id)  # the storage speaks ids; Study offers no public one
