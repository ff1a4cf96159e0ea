"""The durable record of a study, on Optuna storage.

Each trial is one Optuna trial, written RUNNING *before* any work and finished with its result; the
trial's state is the commit point, so after a crash a trial either has its result or is run again.
The exact point travels as one base64 system attribute (never one Optuna parameter per coefficient:
see ``docs/decisions/0002-trial-log.md``); at most 16 summary parameters make the dashboard's plots
meaningful. Only the driver writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective
from mergesearch.merging import Recipe, RunFolderError
from mergesearch.search.fidelity.rules import Estimates
from mergesearch.search.quiet import quiet_optuna
from mergesearch.search.record.journal_lines import naming_the_line
from mergesearch.search.record.journal_trials import JournalTrials
from mergesearch.search.record.optuna_trials import OptunaTrials
from mergesearch.search.record.postgres_trials import PostgresTrials, can_pipeline
from mergesearch.search.record.shown import Shown
from mergesearch.search.record.storage import (
    Storage,
    StorageAccess,
    backend_of,
    database_of,
    journal_of,
)
from mergesearch.search.record.stored import AskedTrial, Ending, StoredTrial, ToldTrial, TrialStore
from mergesearch.search.record.study_attributes import StudyAttributes, study_id_of
from mergesearch.search.record.study_results import StudyResults
from mergesearch.search.record.trial_record import Decode, Kind, TrialRecord, finished_record
from mergesearch.search.record.trial_text import (
    as_recorded,
    asked_text,
    read_asked,
    read_result,
    result_attributes,
)
from mergesearch.search.retry import RetryPolicy
from mergesearch.search.workers.messages import Outcome

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
        decode: Decode,
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
        self._trials = trials_of(storage, self._study_id, self._access)
        self._decoders: dict[int, Decode] = {}  # of running trials, by number
        self._sizes: set[int] = set()  # of points that can be decoded
        self._depth = 0  # of nested batches
        self._waiting: list[Callable[[], None]] = []  # for the end of the batch
        self.records: list[TrialRecord] = []
        naming_the_line(journal_of(storage), self._read_all)
        self._attributes = StudyAttributes(
            storage, self._study_id, self._access, self._trials.flush
        )
        self.results = StudyResults(self._attributes, self.records)
        self.shown = Shown(storage, self._study_id, self._access, self._trials.ids)

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
        same_as: int | None = None,
        decode: Decode | None = None,
        notes: Mapping[str, float] | None = None,
        summary: Mapping[str, float],
        bounds: tuple[float, float],
    ) -> TrialRecord:
        """Record a trial as RUNNING, before any work is done for it.

        Args:
            kind, recipe, name, point, suggestion, tells_at_ask: As in :class:`TrialRecord`.
            item_count, gradient_items, retry_of, same_as: As in :class:`TrialRecord`.
            decode: What makes ``recipe`` of ``point``; the trial's record then needs no recipe once
                it has ended.
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
            merge=recipe,
            tells_at_ask=tells_at_ask,
            tell_index=None,
            state="running",
            item_count=item_count,
            gradient_items=gradient_items,
            retry_of=retry_of,
            same_as=same_as,
        )
        text = asked_text(record, self._template, keep_field=self._keep_fields)
        self._trials.ask(_asked_trial(record, text, notes or {}, summary, bounds))
        self.records.append(record)
        if decode is not None and not self._keep_fields:
            self._decoders[record.number] = decode
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
        outcome = as_recorded(outcome)
        measurement = outcome.measurement
        record = self.records[number]
        item_count = record.item_count if outcome.stopped is None else outcome.stopped
        finished = round(time.time(), 3)
        estimates = estimates or Estimates()
        attributes = result_attributes(outcome, tell_index, item_count, finished, estimates)
        state: Ending = "FAIL"
        values = None
        if measurement is not None:
            # Some items are not all: dashboards would rank the trial beside complete ones.
            state = "COMPLETE" if item_count is None else "PRUNED"
        if measurement is not None and item_count is None:
            values = [float(measurement.values[objective.name]) for objective in self._objectives]
        self._trials.tell(ToldTrial(number, attributes, state, values))
        self.records[number] = finished_record(
            record, outcome, tell_index, finished, estimates, self._decoders.pop(number, None)
        )
        return self.records[number]

    def restore(self, number: int, asked: TrialRecord) -> TrialRecord:
        """Record again what a running trial was asked, whose record was lost.

        Args:
            number: The trial's number.
            asked: The trial as a replay asks it.
        """
        text = asked_text(asked, self._template, keep_field=self._keep_fields)
        self._trials.set_asked(number, text)
        self.records[number] = asked
        return asked

    def set_attr(self, key: str, value: Any) -> None:
        """Record a JSON-able fact of the study."""
        self._attributes.set(key, value)

    def get_attr(self, key: str) -> Any:
        """A fact recorded by :meth:`set_attr`, or None."""
        return self._attributes.get(key)

    @contextmanager
    def batched_writes(self) -> Iterator[None]:
        """What is written inside is recorded together at the end; until then none of it is."""
        self._depth += 1
        try:
            with self._trials.batched_writes():
                yield
        finally:
            self._depth -= 1
            if not self._depth:
                waiting = self._waiting
                self._waiting = []
                for action in waiting if self._trials.settled else ():
                    action()

    def close(self) -> None:
        """Release what only a driver needs; the log can still be read."""
        self._trials.close()

    def once_recorded(self, action: Callable[[], None]) -> None:
        """Act once everything that was written so far is recorded: now, or after the batch.

        Where that fails, nothing is done.
        """
        if self._depth:
            self._waiting.append(action)
        else:
            action()

    def _read_all(self) -> None:
        """Read every trial of the storage."""
        for trial in self._trials.read():
            self.records.append(self._read(trial))

    def _read(self, trial: StoredTrial) -> TrialRecord:
        attributes = trial.attributes
        where = f"{journal_of(self._storage) or 'storage'}: trial {trial.number}"
        record = read_asked(trial.number, attributes, self._template, self._decode, where)
        if record.point is not None and record.point.size not in self._sizes:
            self._sizes.add(record.point.size)
            _ = record.recipe  # refuses points of another study now, not when they are used
        if not trial.finished:
            return record
        names = [objective.name for objective in self._objectives]
        return read_result(record, attributes, names, trial.values, where)


def _asked_trial(
    record: TrialRecord,
    text: str,
    notes: Mapping[str, float],
    summary: Mapping[str, float],
    bounds: tuple[float, float],
) -> AskedTrial:
    """What the storage is given of a record; ``text`` is what is recorded of it."""
    # Rounded for people; the exact point is in the text.
    finite = {key: float(f"{value:.6g}") for key, value in summary.items() if np.isfinite(value)}
    low = min(bounds[0], *finite.values()) if finite else bounds[0]
    high = max(bounds[1], *finite.values()) if finite else bounds[1]
    # The dashboard shows these as columns, and sends them whole to every viewer.
    about: dict[str, str | int | float] = {
        "kind": record.kind,
        **({"name": record.name} if record.name else {}),
        "recipe": record.recipe.digest[:SHOWN_DIGITS],
    }
    if record.retry_of is not None:
        about["retry of"] = record.retry_of
    if record.same_as is not None:
        about["same as"] = record.same_as
    about |= {key: float(f"{value:.4g}") for key, value in notes.items()}
    return AskedTrial(record.number, text, finite, (low, high), about)


def trials_of(storage: Storage, study_id: int, access: StorageAccess) -> TrialStore:
    """The trials of a study: lines of a journal, known tables, or whatever storage Optuna has."""
    journal = backend_of(storage)
    if journal is not None:
        return JournalTrials(journal, study_id, access.write)
    database = access.read(lambda: database_of(storage))
    if database is None:
        return OptunaTrials(storage, study_id, access)
    if can_pipeline(database.engine):
        return PostgresTrials(database.engine, study_id, access)
    return OptunaTrials(storage, study_id, access, database.engine)


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
