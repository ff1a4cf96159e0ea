"""Trials of a study in a journal: lines of Optuna's format, written and read without its objects.

Optuna keeps everything that it reads of a trial for as long as its storage is open, which is three
times as much as a study needs. So the lines of trials are hidden from the storage that a trial log
is open on; whoever else reads the file sees them all.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from mergesearch.search.record.attributes import ASKED, TRIAL_KEYS
from mergesearch.search.record.journal_lines import (
    CREATE_TRIAL,
    DISCARD_TRIALS,
    RUNNING,
    SET_STATE,
    SET_TRIAL,
    SYSTEM_ATTRIBUTE_OF_TRIAL,
    lines_from,
)
from mergesearch.search.record.stored import AskedTrial, StoredTrial, ToldTrial
from mergesearch.search.record.tables import distribution_text

#: Numbers of Optuna's states.
STATES = {"COMPLETE": 1, "PRUNED": 2, "FAIL": 3}
#: What Optuna is shown in place of a line of a trial: an operation that it reads over.
HIDDEN: dict[str, Any] = {"op_code": DISCARD_TRIALS}


class TrialFold:
    """Gathers trials line by line, as Optuna does, but of their attributes ours alone."""

    def __init__(self) -> None:
        self._trials: list[StoredTrial] = []  # of all studies
        self._studies: list[int] = []
        self._counts: dict[int, int] = {}

    def hide(self, log: dict[str, Any]) -> dict[str, Any]:
        """Take a line in, and return what Optuna is shown in its place."""
        code = log["op_code"]
        if code == CREATE_TRIAL:
            self._create(log)
        elif code == SYSTEM_ATTRIBUTE_OF_TRIAL:
            self._set(log["trial_id"], log["system_attr"])
        elif code == SET_STATE:
            self._end(log["trial_id"], log["state"], log["values"])
        return HIDDEN if is_of_trial(log) else log

    def of_study(self, study_id: int) -> list[StoredTrial]:
        """Trials of a study, by number."""
        return [
            trial
            for trial, study in zip(self._trials, self._studies, strict=True)
            if study == study_id
        ]

    def _create(self, log: Mapping[str, Any]) -> None:
        study = log["study_id"]
        number = self._counts.get(study, 0)
        self._counts[study] = number + 1
        attributes = _ours(log.get("system_attrs", {}))
        state = log.get("state", RUNNING)
        values = log.get("values") or ([] if log.get("value") is None else [log["value"]])
        trial_id = len(self._trials)
        self._trials.append(
            StoredTrial(trial_id, number, _finished(state), values or None, attributes)
        )
        self._studies.append(study)

    def _set(self, trial_id: int, attributes: Mapping[str, Any]) -> None:
        trial = self._trials[trial_id]
        if not trial.finished:  # nobody changes a trial that has ended
            known = {**trial.attributes, **_ours(attributes)}
            self._trials[trial_id] = StoredTrial(
                trial_id, trial.number, trial.finished, trial.values, known
            )

    def _end(self, trial_id: int, state: int, values: list[float] | None) -> None:
        trial = self._trials[trial_id]
        if not trial.finished:
            self._trials[trial_id] = StoredTrial(
                trial_id, trial.number, _finished(state), values or trial.values, trial.attributes
            )


def is_of_trial(log: Mapping[str, Any]) -> bool:
    """Whether a line creates or changes a trial."""
    return log["op_code"] == CREATE_TRIAL or log["op_code"] in SET_TRIAL


def without_ours(log: dict[str, Any]) -> dict[str, Any]:
    """A line without the attributes of a trial that are ours."""
    code = log["op_code"]
    if code == CREATE_TRIAL and "system_attrs" in log:
        kept = {k: v for k, v in log["system_attrs"].items() if k not in TRIAL_KEYS}
        return log | {"system_attrs": kept}
    hidden = code == SYSTEM_ATTRIBUTE_OF_TRIAL and _ours(log["system_attr"])
    return HIDDEN if hidden else log


def _ours(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if key in TRIAL_KEYS}


def _finished(state: int) -> bool:
    return state in STATES.values()


class OnceFolded:
    """Hides trials as they are read, and keeps them for the first who asks for them.

    Whoever asks later reads the file again: kept, they would take as much memory as their records.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fold: TrialFold | None = TrialFold()
        self._seen = 0  # lines
        self.created = 0  # trials, of all studies

    def hide(self, number: int, logs: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Logs as Optuna is shown them, from the one of this number on."""
        for log in logs:
            new = number >= self._seen
            if new:
                self._seen += 1
                self.created += log["op_code"] == CREATE_TRIAL
            if new and self._fold is not None:
                yield self._fold.hide(log)
            else:
                yield HIDDEN if is_of_trial(log) else log
            number += 1

    def take(self) -> TrialFold:
        """The trials."""
        fold = self._fold if self._seen else None
        self._fold = None
        if fold is None:
            fold = TrialFold()
            for line in lines_from(self._path, 0):
                fold.hide(json.loads(line))  # which was checked when it was first read
        return fold


#: Runs what writes, as the only driver, several times where the storage cannot be reached.
Write = Callable[[Callable[[], None]], None]


class TrialLines(Protocol):
    """A journal, as trials are written to it and read from it."""

    @property
    def settled(self) -> bool:
        """Whether everything that was appended has reached the disk."""

    @property
    def created(self) -> int:
        """Number of trials in the file, of all studies: the id of the next one."""

    def trials(self) -> TrialFold:
        """The trials of the file."""

    def append_trials(self, logs: list[dict[str, Any]]) -> None:
        """Append lines of trials."""

    def batched_writes(self) -> AbstractContextManager[None]:
        """Write and sync all lines appended inside once, at the end."""


class JournalTrials:
    """Trials of one study, written as lines.

    Args:
        journal: Where the lines are.
        study_id: The study's id there.
        write: How lines are written.
    """

    def __init__(self, journal: TrialLines, study_id: int, write: Write) -> None:
        self._journal = journal
        self._study_id = study_id
        self._write = write
        self._worker = str(uuid.uuid4())  # names the writer of a line
        self.ids: list[int] = []

    @property
    def settled(self) -> bool:
        """Whether everything that was written is recorded."""
        return self._journal.settled

    def read(self) -> Iterator[StoredTrial]:
        """Every trial, by number."""
        for trial in self._journal.trials().of_study(self._study_id):
            self.ids.append(trial.id)
            yield trial

    def ask(self, trial: AskedTrial) -> None:
        """Record the next trial as running."""
        trial_id = self._journal.created
        text = distribution_text(*trial.bounds)
        self._append(
            CREATE_TRIAL,
            study_id=self._study_id,
            datetime_start=_now(),
            state=RUNNING,
            value=None,
            values=None,
            distributions=dict.fromkeys(trial.params, text),
            params=dict(trial.params),
            user_attrs=dict(trial.notes),
            system_attrs={ASKED: trial.text},
            intermediate_values={},
        )
        self.ids.append(trial_id)

    def tell(self, trial: ToldTrial) -> None:
        """Record the attributes of a result, and last the state, which commits them."""
        trial_id = self.ids[trial.number]
        with self.batched_writes():
            for key, value in trial.attributes.items():
                self._append(SYSTEM_ATTRIBUTE_OF_TRIAL, trial_id=trial_id, system_attr={key: value})
            self._append(
                SET_STATE,
                trial_id=trial_id,
                state=STATES[trial.state],
                values=None if trial.values is None else list(trial.values),
                datetime_complete=_now(),
            )

    def set_asked(self, number: int, text: str) -> None:
        """Record again what a running trial was asked."""
        self._append(
            SYSTEM_ATTRIBUTE_OF_TRIAL, trial_id=self.ids[number], system_attr={ASKED: text}
        )

    def batched_writes(self) -> AbstractContextManager[None]:
        """What is written inside reaches the disk together at the end."""
        return self._journal.batched_writes()

    def flush(self) -> None:
        """Record what waits: nothing, as a journal keeps the order of all that is written."""

    def close(self) -> None:
        """Release what only a writer needs: the file stays open for the storage."""

    def _append(self, code: int, **contents: Any) -> None:
        log = {"op_code": code, "worker_id": self._worker, **contents}
        self._write(lambda: self._journal.append_trials([log]))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
