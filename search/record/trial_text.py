"""Trials as JSON attributes of an Optuna trial, and back.

Asking a trial records one attribute, its result some more. Attributes of version 0.1 are read under
the names that they had there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergesearch.evaluators import Measurement
from mergesearch.merging import Recipe, RunFolderError
from mergesearch.merging.foreign.shown import cut, shown
from mergesearch.search.fidelity.rules import Estimates
from mergesearch.search.record.array_text import (
    decode_array,
    encode_array,
    pack_items,
    unpack_items,
)
from mergesearch.search.record.attributes import (
    GRADIENT_RESULT,
    ITEMS,
    RESULT,
    asked_of,
    field_of,
    gradient_of,
    items_of,
    result_of,
)
from mergesearch.search.record.trial_record import Decode, TrialRecord, finished_record
from mergesearch.search.workers.gradient_steps import GradientResult, OptimizerState
from mergesearch.search.workers.messages import Failure, Outcome

#: Where Optuna keeps constraints: above 0 is missed.
CONSTRAINTS = "constraints"


def asked_text(record: TrialRecord, template: Recipe, *, keep_field: bool) -> str:
    """What is recorded of a trial before any work is done for it.

    Args:
        record: The running trial.
        template: The study's recipe; an operator or a routing is recorded where it is another.
        keep_field: Record the field, also where the point stands for it.
    """
    recipe = record.recipe
    point = record.point
    kept = (point is None or keep_field) and not recipe.mixture  # inside which there is no field
    asked = {
        "number": record.number,
        "kind": record.kind,
        "name": record.name,
        "suggestion": record.suggestion,
        "tells_at_ask": record.tells_at_ask,
        "point": None if point is None else encode_array(point),
        "field": recipe.field.to_dict() if kept else None,
    }
    if record.item_count is not None:
        asked["item_count"] = record.item_count
    if record.gradient_items:
        asked["gradient_items"] = record.gradient_items
    if record.retry_of is not None:
        asked["retry_of"] = record.retry_of
    if record.same_as is not None:
        asked["same_as"] = record.same_as
    if record.told_at is not None:
        asked["told_at"] = record.told_at
    if point is None and recipe.basis_key != template.basis_key:
        asked |= {"operator": recipe.operator, "hyperparameters": recipe.options}
    if point is None and recipe.routing:
        asked["routing"] = dict(recipe.routing)
    if point is None and recipe.mixture:
        asked["mixture"] = dict(recipe.mixture)
    return json.dumps(asked)


def read_asked(
    number: int,
    attributes: Mapping[str, Any],
    template: Recipe,
    decode: Decode,
    where: str = "record",
) -> TrialRecord:
    """The running trial that :func:`asked_text` recorded.

    Args:
        number: The trial's number.
        attributes: Of the Optuna trial.
        template: The study's recipe.
        decode: Point -> recipe, where no field is recorded.
        where: The trial, as errors name it.

    Raises:
        RunFolderError: If what is recorded is damaged.
    """
    asked = asked_of(attributes, where)
    if asked.get("number", number) != number:
        raise RunFolderError(
            f"{where}: expected the record of trial {number}, received that of trial "
            f"{asked['number']}; a line before it is lost"
        )
    if (asked.get("retry_of") or 0) > number:
        raise RunFolderError(
            f"{where}: expected an attempt at an earlier trial, received one at {asked['retry_of']}"
        )
    if asked.get("same_as") is not None and asked["same_as"] >= number:
        raise RunFolderError(
            f"{where}: expected the merge of an earlier trial, received that of {asked['same_as']}"
        )
    point = None if asked["point"] is None else decode_array(asked["point"], f"{where}: point")
    lost = asked.get("lost", False)
    merge: Recipe | Decode
    if lost:
        merge = template
    elif point is not None and asked["field"] is None:
        merge = decode
    else:
        merge = _recorded_recipe(asked, template, where)
    return TrialRecord(
        number=number,
        kind=asked["kind"],
        name=asked["name"],
        suggestion=asked["suggestion"],
        point=point,
        merge=merge,
        tells_at_ask=asked["tells_at_ask"],
        tell_index=None,
        state="running",
        item_count=asked.get("item_count"),
        gradient_items=asked.get("gradient_items", 0),
        retry_of=asked.get("retry_of"),
        same_as=asked.get("same_as"),
        lost=lost,
        told_at=asked.get("told_at"),
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
    where: str = "record",
) -> TrialRecord:
    """The finished trial that :func:`result_attributes` recorded.

    Args:
        record: The trial as it was asked.
        attributes: Of the Optuna trial.
        objectives: Names of the objectives.
        values: Of the Optuna trial, one for each objective; read where it is complete.
        where: The trial, as errors name it.

    Raises:
        RunFolderError: If what is recorded is damaged.
    """
    result = result_of(attributes, where)
    failure = result["failure"]
    measurement = None
    if failure is None:
        measurement = Measurement(
            values=_values(result, objectives, values, where, none=record.item_count == 0),
            errors=result["errors"],
            items=items_of(attributes, where),
            violations=result.get("violations", {}),
        )
    outcome = Outcome(
        task="",
        measurement=measurement,
        failure=None if failure is None else _failure(failure),
        seconds=result["seconds"],
        worker=result["worker"],
        gradient_result=_gradient_result(gradient_of(attributes, where)),
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


def _failure(recorded: Mapping[str, Any]) -> Failure:
    return Failure(recorded["kind"], recorded["message"], recorded.get("detail", ""))


def _values(
    result: Mapping[str, Any],
    objectives: Sequence[str],
    values: Sequence[float] | None,
    where: str,
    *,
    none: bool,
) -> Mapping[str, float]:
    """Objective -> value of a trial that has a measurement.

    ``none`` says that it was evaluated on no items: it took gradient steps only, and may have none.
    """
    known = result.get("values")
    if none and known == {}:
        return {}
    if known is None and values is not None and len(values) == len(objectives):
        return dict(zip(objectives, values, strict=True))
    if known is None or set(known) != set(objectives):
        raise RunFolderError(
            f"{where}: expected a value for each of {len(objectives)} objectives, received "
            f"{shown(list(known or values or ()))}"
        )
    return dict(known)


def _recorded_recipe(asked: Mapping[str, Any], template: Recipe, where: str) -> Recipe:
    """The recipe of a trial whose field is recorded: of the study's operator, or of another."""
    if "mixture" in asked:
        return replace(template, mixture=tuple(sorted(asked["mixture"].items())))
    if asked["field"] is None:
        raise RunFolderError(f"{where}: expected a point or a field, received neither")
    try:
        recipe = template.with_field(field_of(asked["field"], where))
    except ValueError as error:  # a field of another study
        raise RunFolderError(f"{where}: field: {cut(str(error), 150)}") from None
    if "operator" in asked:
        options = tuple(sorted(asked.get("hyperparameters", {}).items()))
        recipe = replace(recipe, operator=asked["operator"], hyperparameters=options)
    if "routing" in asked:
        recipe = replace(recipe, routing=tuple(sorted(asked["routing"].items())))
    return recipe


def _gradient_result_data(result: GradientResult) -> dict[str, Any]:
    """The result of gradient steps, JSON-able and exact."""
    data: dict[str, Any] = {"losses": list(result.losses)}
    if result.gradient is not None:
        data["gradient"] = encode_array(result.gradient)
    if result.state is not None:
        data |= {"count": result.state.count, "raw": encode_array(result.state.raw)}
        data["moments"] = encode_array(result.state.moments.ravel())
    return data


def _gradient_result(data: Mapping[str, Any] | None) -> GradientResult | None:
    """Inverse of :func:`_gradient_result_data`, its arrays decoded."""
    if data is None:
        return None
    state = None
    if "raw" in data:
        state = OptimizerState(data["raw"], data["moments"].reshape(2, -1), data["count"])
    return GradientResult(tuple(data["losses"]), state, data.get("gradient"))
