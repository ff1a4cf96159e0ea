"""Attributes of trials and studies as JSON texts, parsed and checked before anything is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergesearch.merging import Field, InputError, RunFolderError
from mergesearch.merging.foreign.json_text import parse_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import cut, name_shown
from mergesearch.search.record.array_text import decode_array, unpack_items
from mergesearch.search.record.shapes import (
    STUDY_SHAPES,
    Asked,
    GradientShape,
    Result,
    conform,
)

#: What is recorded when a trial is asked and when it is told, each as one JSON attribute.
ASKED = "mergesearch:asked"
RESULT = "mergesearch:result"
#: Packed scores of items, and the result of gradient steps.
ITEMS = "mergesearch:items"
GRADIENT_RESULT = "mergesearch:gradient_result"
#: Name of :data:`GRADIENT_RESULT` in records of version 0.1.
GRADIENT_RESULT_01 = "mergesearch:descended"
#: All attributes of ours that a trial may have.
TRIAL_KEYS = (ASKED, RESULT, ITEMS, GRADIENT_RESULT, GRADIENT_RESULT_01)
#: Begins the keys of a study's attributes.
PREFIX = "mergesearch:"
#: Keys of version 0.1 in :data:`ASKED` and :data:`RESULT` -> their names now.
KEYS_01 = {
    "tells_before": "tells_at_ask",
    "told": "tell_index",
    "part": "item_count",
    "looked": "gradient_items",
}


def attribute_text(attributes: Mapping[str, Any], key: str, where: str) -> Any:
    """The parsed JSON of an attribute that must be there.

    Raises:
        RunFolderError: If it is missing, or no JSON text.
    """
    text = Node(attributes, where, RunFolderError).at(key).text()
    return parse_json(text, f"{where}: {key}", RunFolderError)


def asked_of(attributes: Mapping[str, Any], where: str) -> Any:
    """What was recorded when a trial was asked, under the names of this version.

    Raises:
        RunFolderError: If it is missing or of another shape, or a trial lacks the point that only
            anchors, which the space need not hold, and lost trials may lack.
    """
    recorded = attribute_text(attributes, ASKED, where)
    asked = conform(Asked, _with_new_keys(recorded), f"{where}: {ASKED}")
    if asked["point"] is None and asked["kind"] != "anchor" and not asked.get("lost"):
        raise RunFolderError(
            f"{where}: {ASKED}: expected the point of a {asked['kind']} trial, received none"
        )
    return asked


def field_of(recorded: Mapping[str, Any], where: str) -> Field:
    """The field that was recorded of a trial.

    Raises:
        RunFolderError: If it is none, such as one with rows of unequal lengths.
    """
    try:
        return Field.from_dict(recorded)
    except (ValueError, InputError) as error:
        raise RunFolderError(f"{where}: field: {cut(str(error), 150)}") from None


def result_of(attributes: Mapping[str, Any], where: str) -> Any:
    """What was recorded when a trial was told, under the names of this version.

    Raises:
        RunFolderError: If it is missing or of another shape.
    """
    result = attribute_text(attributes, RESULT, where)
    return conform(Result, _with_new_keys(result), f"{where}: {RESULT}")


def items_of(attributes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Objective -> scores of items ``(items,)`` of a trial; empty where none are recorded.

    Raises:
        RunFolderError: If they are damaged.
    """
    if ITEMS not in attributes:
        return {}
    packed = attribute_text(attributes, ITEMS, where)
    return unpacked(conform(dict[str, str], packed, f"{where}: {ITEMS}"), f"{where}: {ITEMS}")


def unpacked(packed: Mapping[str, str], where: str) -> dict[str, Any]:
    """Scores of items by objective.

    Raises:
        RunFolderError: If a text is damaged.
    """
    return {
        key: unpack_items(text, f"{where}: {name_shown(key, 40)}") for key, text in packed.items()
    }


def gradient_of(attributes: Mapping[str, Any], where: str) -> Any:
    """What was recorded of a trial's gradient steps, or None; its arrays are decoded.

    Raises:
        RunFolderError: If it is damaged.
    """
    key = GRADIENT_RESULT if GRADIENT_RESULT in attributes else GRADIENT_RESULT_01
    if key not in attributes:
        return None
    inside = f"{where}: {key}"
    data = conform(GradientShape, attribute_text(attributes, key, where), inside)
    arrays = {name: decode_array(data[name], f"{inside}: {name}") for name in _ARRAYS & data.keys()}
    state = {"raw", "moments", "count"} & data.keys()
    if state and len(state) < 3:
        raise RunFolderError(f"{inside}: expected raw, moments and count, received {sorted(state)}")
    if state and arrays["moments"].size != 2 * arrays["raw"].size:
        raise RunFolderError(f"{inside}: moments: expected two numbers for each of raw")
    return data | arrays


_ARRAYS = {"gradient", "raw", "moments"}


def study_value(key: str, text: Any, where: str) -> Any:
    """The value of a study's attribute, in the shape that its key has.

    Args:
        key: Without the prefix.
        text: As it is recorded.
        where: The file, as errors name it.

    Raises:
        RunFolderError: If it is damaged.
    """
    inside = f"{where}: {name_shown(key, 60)}"
    value = parse_json(Node(text, inside, RunFolderError).text(), inside, RunFolderError)
    shape = STUDY_SHAPES.get(key)
    if shape is None:
        shape = STUDY_SHAPES.get(key.split(":")[0].split(" ")[0])
    return value if shape is None else conform(shape, value, inside)


def check_trial_attribute(key: str, value: Any, where: str) -> None:
    """Refuse an attribute of a trial that cannot be read back.

    Raises:
        RunFolderError: In one line.
    """
    attributes = {key: value}
    if key == ASKED:
        asked = asked_of(attributes, where)
        if asked["point"] is not None:
            decode_array(asked["point"], f"{where}: point")
        if asked["field"] is not None:
            field_of(asked["field"], where)
        elif asked["point"] is None and not asked.get("lost"):
            raise RunFolderError(f"{where}: expected a point or a field, received neither")
    elif key == RESULT:
        result_of(attributes, where)
    elif key == ITEMS:
        items_of(attributes, where)
    elif key in (GRADIENT_RESULT, GRADIENT_RESULT_01):
        gradient_of(attributes, where)
    elif key == "constraints":
        conform(list[float], value, f"{where}: {key}")


def check_study_attribute(key: str, value: Any, where: str) -> None:
    """Refuse an attribute of a study that cannot be read back.

    Raises:
        RunFolderError: In one line.
    """
    if key.startswith(PREFIX):
        read = study_value(key.removeprefix(PREFIX), value, where)
        score = read.get("score") if key.startswith(f"{PREFIX}score:") and read else None
        if score is not None:
            unpacked(score["items"], where)
            unpacked(score.get("weights", {}), where)
            unpacked(score.get("resampled", {}), where)
    elif key == "study:metric_names":
        conform(list[str], value, f"{where}: {key}")


def _with_new_keys(data: Any) -> Any:
    """Contents of an attribute, under the names of this version."""
    return {KEYS_01.get(k, k): v for k, v in data.items()} if isinstance(data, dict) else data
