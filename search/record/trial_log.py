"""The durable record of a study, on Optuna storage.

Each trial is one Optuna trial, written RUNNING *before* any work and finished with its result; the
trial's state is the commit point, so a crash leaves either a told trial or one that is run again.
The exact point travels as one base64 system attribute (never one Optuna parameter per coefficient:
see ``docs/decisions/0002-trial-log.md``); at most 16 summary parameters make the dashboard's plots
meaningful. Only the driver writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Measurement, Objective, Split
from mergesearch.merging import Field, Recipe, RunFolderError, StudyFailedError
from mergesearch.search.quiet import quiet_optuna
from mergesearch.search.record.array_text import (
    decode_array,
    encode_array,
    pack_items,
    unpack_items,
)
from mergesearch.search.record.storage import StorageAway
from mergesearch.search.record.trial_record import Kind, Score, TrialRecord, Verdict
from mergesearch.search.retry import RetryPolicy
from mergesearch.search.workers.gradient_steps import GradientResult, OptimizerState
from mergesearch.search.workers.messages import Failure, Outcome

if TYPE_CHECKING:
    import optuna

T = TypeVar("T")

#: What ``ask`` records, and what ``tell`` records, each as one JSON system attribute.
ASKED = "mergesearch:asked"
RESULT = "mergesearch:result"
ITEMS = "mergesearch:items"
#: Where Optuna keeps constraints: above 0 is missed.
CONSTRAINTS = "constraints"
#: The result of gradient steps, the same.
GRADIENT_RESULT = "mergesearch:gradient_result"
#: Its key in records of version 0.1, and the names that other facts of a trial had there.
GRADIENT_RESULT_01 = "mergesearch:descended"
KEYS_01 = {
    "tells_before": "tells_at_ask",
    "told": "tell_index",
    "part": "item_count",
    "looked": "gradient_items",
}


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
        patience: How long to wait for a storage that is away; default not at all.
        guard: Called before every write; raises where this process may not write.
    """

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        name: str,
        objectives: Sequence[Objective],
        decode: Callable[[npt.NDArray[np.float64]], Recipe],
        template: Recipe,
        *,
        keep_fields: bool = False,
        create: bool = True,
        patience: RetryPolicy | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage = storage
        self._patience = patience or RetryPolicy(0)
        self._guard = guard
        self._keeps_fields = keep_fields
        self._objectives = tuple(objectives)
        self._decode = decode
        self._template = template
        self._study_id = self._patient(lambda: self._open_study(name, create))
        self._trial_ids: dict[int, int] = {}
        self.records: list[TrialRecord] = []
        for trial in self._patient(lambda: storage.get_all_trials(self._study_id, deepcopy=False)):
            self._trial_ids[trial.number] = trial._trial_id
            self.records.append(self._parse(trial))

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
        notes: Mapping[str, float] | None = None,
        summary: Mapping[str, float],
        bounds: tuple[float, float],
    ) -> TrialRecord:
        """Record a trial as RUNNING, in one storage operation, before any work is done for it."""
        from optuna.distributions import FloatDistribution
        from optuna.trial import TrialState, create_trial

        asked = {
            "kind": kind,
            "name": name,
            "suggestion": suggestion,
            "tells_at_ask": tells_at_ask,
            "point": None if point is None else encode_array(point),
            "field": recipe.field.to_dict() if point is None or self._keeps_fields else None,
        }
        if item_count is not None:
            asked["item_count"] = item_count
        if gradient_items:
            asked["gradient_items"] = gradient_items
        if point is None and recipe.basis_key != self._template.basis_key:
            asked |= {"operator": recipe.operator, "hyperparameters": recipe.options}
        if point is None and recipe.routing:
            asked["routing"] = dict(recipe.routing)
        finite = {key: float(value) for key, value in summary.items() if np.isfinite(value)}
        low = min(bounds[0], *finite.values()) if finite else bounds[0]
        high = max(bounds[1], *finite.values()) if finite else bounds[1]
        template = create_trial(
            state=TrialState.RUNNING,
            params=finite,
            distributions={key: FloatDistribution(low, high) for key in finite},
            user_attrs={"kind": name or kind, "recipe": recipe.digest, **(notes or {})},
            system_attrs={ASKED: json.dumps(asked)},
        )
        number = len(self.records)
        self._trial_ids[number] = self._create(number, template)
        record = TrialRecord(
            number,
            kind,
            name,
            suggestion,
            point,
            recipe,
            tells_at_ask,
            None,
            "running",
            item_count,
            gradient_items,
        )
        self.records.append(record)
        return record

    def tell(
        self,
        number: int,
        outcome: Outcome,
        tell_index: int | None,
        estimates: Mapping[str, float] | None = None,
    ) -> TrialRecord:
        """Record the result of a running trial; setting the state comes last and commits it.

        ``estimates`` are those of a trial that a rule stopped.
        """
        from optuna.trial import TrialState

        item_count = self.records[number].item_count
        attributes: dict[str, Any] = {}
        item_count = item_count if outcome.stopped is None else outcome.stopped
        outcome = _as_recorded(outcome)
        measurement = outcome.measurement
        finished = round(time.time(), 3)
        result = {
            "tell_index": tell_index,
            "seconds": {key: round(value, 6) for key, value in outcome.seconds.items()},
            "errors": dict(measurement.errors) if measurement else {},
            "failure": None if outcome.failure is None else vars(outcome.failure),
            "worker": outcome.worker,
            "finished": finished,
        }
        if outcome.cpu_share is not None:
            result["cpu_share"] = round(outcome.cpu_share, 3)
        if measurement and item_count is not None:
            result["values"] = dict(measurement.values)
        if outcome.rungs:
            result["rungs"] = {str(items): dict(values) for items, values in outcome.rungs.items()}
        if outcome.stopped is not None:
            result |= {"stopped": outcome.stopped, "estimates": dict(estimates or {})}
        if measurement and measurement.violations:
            result["violations"] = dict(measurement.violations)
            attributes[CONSTRAINTS] = list(measurement.violations.values())
        if measurement and measurement.items:
            packed = {key: pack_items(scores) for key, scores in measurement.items.items()}
            attributes[ITEMS] = json.dumps(packed)
        if outcome.gradient_result is not None:
            attributes[GRADIENT_RESULT] = json.dumps(_as_text(outcome.gradient_result))
        attributes[RESULT] = json.dumps(result)
        state = TrialState.FAIL
        values = None
        if measurement is not None:
            # A part is not complete: dashboards would rank it beside trials on all items.
            state = TrialState.COMPLETE if item_count is None else TrialState.PRUNED
        if measurement is not None and item_count is None:
            values = [float(measurement.values[objective.name]) for objective in self._objectives]
        with self.batched_writes():
            self._persist(lambda: self._finish(self._trial_ids[number], attributes, state, values))
        record = _finished(self.records[number], outcome, tell_index, finished, estimates or {})
        self.records[number] = record
        return record

    def set_attr(self, key: str, value: Any) -> None:
        """Record a JSON-able fact of the study."""
        text = json.dumps(value)
        self._persist(
            lambda: self._storage.set_study_system_attr(self._study_id, f"mergesearch:{key}", text)
        )

    def get_attr(self, key: str) -> Any:
        """A fact recorded by :meth:`set_attr`, or None."""
        return self._patient(lambda: _read_note(self._storage, self._study_id, key))

    def set_score(self, split: Split, number: int, score: Score | None) -> None:
        """Record a re-evaluation on validation or test items; None: it failed."""
        value = None
        if score is not None:
            items = {key: pack_items(scores) for key, scores in score.items.items()}
            value = {"values": dict(score.values), "errors": dict(score.errors), "items": items}
            value["violations"] = dict(score.violations)
        self.set_attr(f"score:{split}:{number}", {"score": value})

    def score(self, split: Split, number: int) -> tuple[bool, Score | None]:
        """Whether a re-evaluation is recorded, and its score (None when it failed)."""
        entry = self.get_attr(f"score:{split}:{number}")
        if entry is None:
            return False, None
        score = entry["score"]
        if score is None:
            return True, None
        items = {key: unpack_items(packed) for key, packed in score["items"].items()}
        return True, Score(score["values"], score["errors"], items, score.get("violations", {}))

    def set_reference(self, split: Split, name: str, means: Mapping[str, float]) -> None:
        """Record what an anchor scores in every domain of a split, for objectives that are relative
        to it.
        """
        self.set_attr(f"references:{split}", dict(self.references(split)) | {name: dict(means)})

    def references(self, split: Split) -> Mapping[str, Mapping[str, float]]:
        """Anchor -> ``metric/domain`` -> value, as far as recorded."""
        return self.get_attr(f"references:{split}") or {}

    def verdict(self) -> Verdict | None:
        """The recorded final choice, or None while the study is unfinished."""
        noted = self.get_attr("verdict")
        if noted is None:
            return None
        scores: dict[Split, dict[int, Score]] = {}
        for split in ("validation", "test"):
            found = {record.number: self.score(split, record.number)[1] for record in self.records}
            scores[split] = {number: score for number, score in found.items() if score is not None}
        return Verdict(noted["winner"], tuple(noted["front"]), tuple(noted["leaders"]), scores)

    def _open_study(self, name: str, create: bool) -> int:
        try:
            return _existing_study(self._storage, name)
        except RunFolderError:
            if not create:
                raise
            return _create_study(self._storage, name, self._objectives)

    def batched_writes(self) -> AbstractContextManager[None]:
        """What is recorded inside reaches the disk at once, at the end; only a journal has such a
        way.
        """
        together: Callable[[], AbstractContextManager[None]] | None
        together = getattr(getattr(self._storage, "_backend", None), "together", None)
        return nullcontext() if together is None else together()

    def _persist(self, write: Callable[[], T]) -> T:
        """Write as the study's only driver, waiting for a storage that is away; ``write`` may run
        several times.
        """

        def guarded() -> T:
            self._guard()
            return write()

        return self._patient(guarded)

    def _patient(self, action: Callable[[], T]) -> T:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        transient = (StorageAway, optuna.exceptions.StorageInternalError, SQLAlchemyError)
        return self._patience(action, transient, "storage")

    def _create(self, number: int, template: optuna.trial.FrozenTrial) -> int:
        """Id of the new trial of this number."""
        storage = self._storage
        again = False

        def attempt() -> int:
            nonlocal again
            # A connection that broke after the commit has left the trial behind.
            left = again and storage.get_n_trials(self._study_id) > number
            again = True
            if left:
                trial_id = storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
                ours = (
                    storage.get_trial(trial_id).system_attrs.get(ASKED)
                    == template.system_attrs[ASKED]
                )
            else:
                trial_id = storage.create_new_trial(self._study_id, template_trial=template)
                ours = storage.get_trial_number_from_id(trial_id) == number
            if not ours:
                raise StudyFailedError(
                    f"storage: expected trial {number} to be this driver's, found another's; stop "
                    "the other driver of "
                    "this study and run the same command again"
                )
            return trial_id

        return self._persist(attempt)

    def _finish(
        self,
        trial_id: int,
        attributes: Mapping[str, Any],
        state: optuna.trial.TrialState,
        values: list[float] | None,
    ) -> None:
        """Attributes first, the state last: it commits them."""
        import optuna

        storage = self._storage
        try:
            for key, value in attributes.items():
                storage.set_trial_system_attr(trial_id, key, value)
            storage.set_trial_state_values(trial_id, state, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            # A connection that broke after the commit: it is told already, by this very result.
            if storage.get_trial(trial_id).system_attrs.get(RESULT) != attributes[RESULT]:
                raise StudyFailedError(
                    "storage: expected a running trial, found one that another driver has told; "
                    "run the same "
                    "command again"
                ) from None

    def publish_note(self, markdown: str) -> None:
        """Set the study's note in the dashboard."""
        import optuna
        import optuna_dashboard

        def save() -> None:
            with quiet_optuna():
                name = self._storage.get_study_name_from_id(self._study_id)
                optuna_dashboard.save_note(
                    optuna.load_study(storage=self._storage, study_name=name), markdown
                )

        self._persist(save)

    def _recorded(self, asked: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial whose field is recorded: the study's sources, its operator or
        another.
        """
        recipe = self._template.with_field(Field.from_dict(asked["field"]))
        if "operator" in asked:
            options = tuple(sorted(asked["hyperparameters"].items()))
            recipe = replace(recipe, operator=asked["operator"], hyperparameters=options)
        if "routing" in asked:
            recipe = replace(recipe, routing=tuple(sorted(asked["routing"].items())))
        return recipe

    def _parse(self, trial: optuna.trial.FrozenTrial) -> TrialRecord:
        asked = _with_new_keys(json.loads(trial.system_attrs[ASKED]))
        point = None if asked["point"] is None else decode_array(asked["point"])
        recipe = (
            self._decode(point)
            if point is not None and asked["field"] is None
            else self._recorded(asked)
        )
        record = TrialRecord(
            number=trial.number,
            kind=asked["kind"],
            name=asked["name"],
            suggestion=asked["suggestion"],
            point=point,
            recipe=recipe,
            tells_at_ask=asked["tells_at_ask"],
            tell_index=None,
            state="running",
            item_count=asked.get("item_count"),
            gradient_items=asked.get("gradient_items", 0),
        )
        if not trial.state.is_finished():
            return record
        result = _with_new_keys(json.loads(trial.system_attrs[RESULT]))
        items = json.loads(trial.system_attrs.get(ITEMS, "{}"))
        failure = result["failure"]
        measurement = None
        if failure is None:
            names = [objective.name for objective in self._objectives]
            measurement = Measurement(
                values=result["values"]
                if "values" in result
                else dict(zip(names, trial.values, strict=True)),
                errors=result["errors"],
                items={key: unpack_items(packed) for key, packed in items.items()},
                violations=result.get("violations", {}),
            )
        attributes = trial.system_attrs
        walk = attributes.get(GRADIENT_RESULT) or attributes.get(GRADIENT_RESULT_01)
        outcome = Outcome(
            "",
            measurement,
            None if failure is None else Failure(**failure),
            result["seconds"],
            result["worker"],
            None if walk is None else _from_text(json.loads(walk)),
            {int(items): values for items, values in result.get("rungs", {}).items()},
            result.get("stopped"),
            result.get("cpu_share"),
        )
        return _finished(
            record, outcome, result["tell_index"], result["finished"], result.get("estimates", {})
        )


def _with_new_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial's attribute holds, in the names of this version."""
    return {KEYS_01.get(key, key): value for key, value in data.items()}


def _as_text(gradient_result: GradientResult) -> dict[str, Any]:
    """The result of gradient steps, JSON-able and exact."""
    data: dict[str, Any] = {"losses": list(gradient_result.losses)}
    if gradient_result.gradient is not None:
        data["gradient"] = encode_array(gradient_result.gradient)
    if gradient_result.state is not None:
        data |= {
            "count": gradient_result.state.count,
            "raw": encode_array(gradient_result.state.raw),
        }
        data["moments"] = encode_array(gradient_result.state.moments.ravel())
    return data


def _from_text(data: Mapping[str, Any]) -> GradientResult:
    """Inverse of :func:`_as_text`."""
    state = None
    if "raw" in data:
        state = OptimizerState(
            decode_array(data["raw"]), decode_array(data["moments"]).reshape(2, -1), data["count"]
        )
    gradient = decode_array(data["gradient"]) if "gradient" in data else None
    return GradientResult(tuple(data["losses"]), state, gradient)


def study_note(storage: optuna.storages.BaseStorage, name: str, key: str) -> Any:
    """A fact of the study called ``name``, or None, without reading its trials.

    Raises:
        RunFolderError: If the storage does not hold the study.
    """
    return _read_note(storage, _existing_study(storage, name), key)


def _read_note(storage: optuna.storages.BaseStorage, study_id: int, key: str) -> Any:
    text = storage.get_study_system_attrs(study_id).get(f"mergesearch:{key}")
    return None if text is None else json.loads(text)


def _existing_study(storage: optuna.storages.BaseStorage, name: str) -> int:
    try:
        return int(storage.get_study_id_from_name(name))
    except KeyError:
        raise RunFolderError(
            f"expected a study called {name!r} in the storage, found none; see `mergesearch run`"
        ) from None


def _create_study(
    storage: optuna.storages.BaseStorage, name: str, objectives: Sequence[Objective]
) -> int:
    """Id of a new study with its directions and metric names."""
    import optuna

    with quiet_optuna():
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[objective.direction for objective in objectives],
            sampler=optuna.samplers.RandomSampler(
                seed=0
            ),  # never asked; the default would import more
        )
        study.set_metric_names([objective.name for objective in objectives])
    return int(study._study_id)  # the storage speaks ids; Study offers no public one


def _as_recorded(outcome: Outcome) -> Outcome:
    """The outcome with item scores as the log holds them, so that a live strategy and its replay
    see the same.
    """
    measurement = outcome.measurement
    if measurement is None or not measurement.items:
        return outcome
    items = {key: unpack_items(pack_items(scores)) for key, scores in measurement.items.items()}
    return replace(outcome, measurement=replace(measurement, items=items))


def _finished(
    record: TrialRecord,
    outcome: Outcome,
    tell_index: int | None,
    finished: float,
    estimates: Mapping[str, float],
) -> TrialRecord:
    measurement = outcome.measurement
    whole = record.item_count is None and outcome.stopped is None
    return replace(
        record,
        tell_index=tell_index,
        state="failed" if measurement is None else "complete" if whole else "partial",
        values=dict(measurement.values) if measurement else {},
        errors=dict(measurement.errors) if measurement else {},
        items=dict(measurement.items) if measurement else {},
        seconds=dict(outcome.seconds),
        failure=outcome.failure,
        worker=outcome.worker,
        finished=finished,
        gradient_result=outcome.gradient_result,
        stopped=outcome.stopped,
        cpu_share=outcome.cpu_share,
        estimates=dict(estimates),
        rungs=dict(outcome.rungs),
        violations=dict(measurement.violations) if measurement else {},
    )
