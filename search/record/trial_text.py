"""Trials as JSON attributes of an Optuna trial, and back.

Asking a trial records one attribute, its result some more. Attributes of version 0.1 are read under
the names that they had there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Measurement
from mergesearch.merging import Field, Recipe
from mergesearch.search.fidelity.rules import Estimates
from mergesearch.search.record.array_text import (
    decode_array,
    encode_array,
    pack_items,
    unpack_items,
)
from mergesearch.search.record.trial_record import TrialRecord, finished_record
from mergesearch.search.workers.gradient_steps import GradientResult, OptimizerState
from mergesearch.search.workers.messages import Failure, Outcome

#: What is recorded when a trial is asked and when it is told, each as one JSON attribute.
ASKED = "mergesearch:asked"
RESULT = "mergesearch:result"
#: Packed scores of items, and the result of gradient steps.
ITEMS = "mergesearch:items"
GRADIENT_RESULT = "mergesearch:gradient_result"
#: Where Optuna keeps constraints: above 0 is missed.
CONSTRAINTS = "constraints"
#: Name of :data:`GRADIENT_RESULT` in records of version 0.1.
GRADIENT_RESULT_01 = "mergesearch:descended"
#: Keys of version 0.1 in :data:`ASKED` and :data:`RESULT` -> their names now.
KEYS_01 = {
    "tells_before": "tells_at_ask",
    "told": "tell_index",
    "part": "item_count",
    "looked": "gradient_items",
}


def asked_text(record: TrialRecord, template: Recipe, *, keep_field: bool) -> str:
    """What is recorded of a trial before any work is done for it.

    Args:
        record: The running trial.
        template: The study's recipe; an operator or a routing is recorded where it is another.
        keep_field: Record the field, also where the point stands for it.
    """
    recipe = record.recipe
    point = record.point
    asked = {
        "kind": record.kind,
        "name": record.name,
        "suggestion": record.suggestion,
        "tells_at_ask": record.tells_at_ask,
        "point": None if point is None else encode_array(point),
        "field": recipe.field.to_dict() if point is None or keep_field else None,
    }
    if record.item_count is not None:
        asked["item_count"] = record.item_count
    if record.gradient_items:
        asked["gradient_items"] = record.gradient_items
    if record.retry_of is not None:
        asked["retry_of"] = record.retry_of
    if point is None and recipe.basis_key != template.basis_key:
        asked |= {"operator": recipe.operator, "hyperparameters": recipe.options}
    if point is None and recipe.routing:
        asked["routing"] = dict(recipe.routing)
    return json.dumps(asked)


def read_asked(
    number: int,
    attributes: Mapping[str, Any],
    template: Recipe,
    decode: Callable[[npt.NDArray[np.float64]], Recipe],
) -> TrialRecord:
    """The running trial that :func:`asked_text` recorded.

    Args:
        number: The trial's number.
        attributes: Of the Optuna trial.
        template: The study's recipe.
        decode: Point -> recipe, where no field is recorded.
    """
    asked = _with_new_keys(json.loads(attributes[ASKED]))
    point = None if asked["point"] is None else decode_array(asked["point"])
    if point is not None and asked["field"] is None:
        recipe = decode(point)
    else:
        recipe = _recorded_recipe(asked, template)
    return TrialRecord(
        number=number,
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
        retry_of=asked.get("retry_of"),
    )


def result_attributes(
    outcome: Outcome,
    tell_index: int | None,
    item_count: int | None,
    finished: float,
    estimates: Estimates,
) -> dict[str, str | list[float]]:
    """What is recorded of a trial's result, attribute by attribute, in the order of writing.

    Args:
        outcome: The result, as :func:`as_recorded` gives it.
        tell_index: Place of the trial in the order of tells, for search trials.
        item_count: Items that it was evaluated on, the first so many; None: all.
        finished: When the result came, seconds since 1970.
        estimates: What a stopped trial would have scored on all items.
    """
    attributes: dict[str, str | list[float]] = {}
    measurement = outcome.measurement
    result: dict[str, Any] = {
        "tell_index": tell_index,
        "seconds": {key: round(value, 6) for key, value in outcome.seconds.items()},
        "errors": dict(measurement.errors) if measurement else {},
        "failure": None if outcome.failure is None else vars(outcome.failure),
        "worker": outcome.worker,
        "finished": finished,
    }
    if outcome.cpu_share is not None:
        result["cpu_share"] = round(outcome.cpu_share, 3)
    if outcome.batch_size is not None:
        result["batch_size"] = outcome.batch_size
    if measurement and item_count is not None:
        result["values"] = dict(measurement.values)
    if outcome.rungs:
        result["rungs"] = {str(items): dict(values) for items, values in outcome.rungs.items()}
    if outcome.stopped is not None:
        result |= {"stopped": outcome.stopped, "estimates": dict(estimates.values)}
        result["estimate_errors"] = dict(estimates.errors)
    if measurement and measurement.violations:
        result["violations"] = dict(measurement.violations)
        attributes[CONSTRAINTS] = list(measurement.violations.values())
    if measurement and measurement.items:
        packed = {key: pack_items(scores) for key, scores in measurement.items.items()}
        attributes[ITEMS] = json.dumps(packed)
    if outcome.gradient_result is not None:
        attributes[GRADIENT_RESULT] = json.dumps(_gradient_result_data(outcome.gradient_result))
    attributes[RESULT] = json.dumps(result)
    return attributes


def read_result(
    record: TrialRecord,
    attributes: Mapping[str, Any],
    objectives: Sequence[str],
    values: Sequence[float] | None,
) -> TrialRecord:
    """The finished trial that :func:`result_attributes` recorded.

    Args:
        record: The trial as it was asked.
        attributes: Of the Optuna trial.
        objectives: Names of the objectives.
        values: Of the Optuna trial, one for each objective; read where it is complete.
    """
    result = _with_new_keys(json.loads(attributes[RESULT]))
    failure = result["failure"]
    measurement = None
    if failure is None:
        items = json.loads(attributes.get(ITEMS, "{}"))
        measurement = Measurement(
            values=result["values"]
            if "values" in result
            else dict(zip(objectives, values or (), strict=True)),
            errors=result["errors"],
            items={key: unpack_items(packed) for key, packed in items.items()},
            violations=result.get("violations", {}),
        )
    gradient_text = attributes.get(GRADIENT_RESULT) or attributes.get(GRADIENT_RESULT_01)
    outcome = Outcome(
        task="",
        measurement=measurement,
        failure=None if failure is None else Failure(**failure),
        seconds=result["seconds"],
        worker=result["worker"],
        gradient_result=None if gradient_text is None else _gradient_result(gradient_text),
        rungs={int(items): values for items, values in result.get("rungs", {}).items()},
        stopped=result.get("stopped"),
        cpu_share=result.get("cpu_share"),
        batch_size=result.get("batch_size"),
    )
    estimates = Estimates(result.get("estimates", {}), result.get("estimate_errors", {}))
    return finished_record(record, outcome, result["tell_index"], result["finished"], estimates)


def as_recorded(outcome: Outcome) -> Outcome:
    """The outcome with item scores as the log holds them.

    A live strategy and its replay then see the same.
    """
    measurement = outcome.measurement
    if measurement is None or not measurement.items:
        return outcome
    items = {key: unpack_items(pack_items(scores)) for key, scores in measurement.items.items()}
    return replace(outcome, measurement=replace(measurement, items=items))


def _recorded_recipe(asked: Mapping[str, Any], template: Recipe) -> Recipe:
    """The recipe of a trial whose field is recorded: of the study's operator, or of another."""
    recipe = template.with_field(Field.from_dict(asked["field"]))
    if "operator" in asked:
        options = tuple(sorted(asked["hyperparameters"].items()))
        recipe = replace(recipe, operator=asked["operator"], hyperparameters=options)
    if "routing" in asked:
        recipe = replace(recipe, routing=tuple(sorted(asked["routing"].items())))
    return recipe


def _with_new_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of an attribute, under the names of this version."""
    return {KEYS_01.get(key, key): value for key, value in data.items()}


def _gradient_result_data(result: GradientResult) -> dict[str, Any]:
    """The result of gradient steps, JSON-able and exact."""
    data: dict[str, Any] = {"losses": list(result.losses)}
    if result.gradient is not None:
        data["gradient"] = encode_array(result.gradient)
    if result.state is not None:
        data |= {"count": result.state.count, "raw": encode_array(result.state.raw)}
        data["moments"] = encode_array(result.state.moments.ravel())
    return data


def _gradient_result(text: str) -> GradientResult:
    """Inverse of :func:`_gradient_result_data`, from its JSON text."""
    data = json.loads(text)
    state = None
    if "raw" in data:
        state = OptimizerState(
            decode_array(data["raw"]), decode_array(data["moments"]).reshape(2, -1), data["count"]
        )
    gradient = decode_array(data["gradient"]) if "gradient" in data else None
    return GradientResult(tuple(data["losses"]), state, gradient)
