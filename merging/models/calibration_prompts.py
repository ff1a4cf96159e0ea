"""Class prompts of calibration items: what a recipe says of them, checked, and the heads made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.tokenizer_folder import tokenizer_in
from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.datasets_folder import class_names as class_names_of
from mergesearch.merging.foreign.paths import expanded, is_folder
from mergesearch.merging.models.prompt_heads import PromptHeads, check_prompts, compares_texts

#: Keys that describe the heads; recipes without prompts do not have them.
KEYS = ("prompts", "classes", "tokenizer")
#: Auto class of models that need prompts to answer.
ZERO_SHOT = "AutoModelForZeroShotImageClassification"


def refuse_prompts(calibration: Mapping[str, Any]) -> str | None:
    """What is wrong with the prompts of a calibration, or None; known from its keys alone."""
    if "prompts" not in calibration:
        alone = next((key for key in ("classes", "tokenizer") if key in calibration), None)
        if alone is not None:
            return f"calibration.{alone}: expected none without calibration.prompts; leave it out"
        if calibration["model_class"] == ZERO_SHOT and "input_ids" not in calibration["inputs"]:
            return (
                f"calibration.prompts: required key is missing: {ZERO_SHOT} compares images with "
                'texts; write prompts: ["a photo of a {}."], and classes'
            )
        return None
    for key in ("prompts", "classes"):
        empty = next(
            (t for t, texts in by_task(calibration.get(key, [""])).items() if not texts), None
        )
        if empty is not None:
            return f"calibration.{key}: expected some for every expert, received none for {empty!r}"
    data = calibration["data"]
    try:
        classes = class_names(calibration)
        tasks = sorted({*classes, *(data if isinstance(data, Mapping) else ())} - {""})
        check_prompts(by_task(calibration["prompts"]), tasks, "calibration")
    except InputError as error:
        return str(error)
    lacking = sorted(set(tasks) - set(classes)) if "" not in classes else []
    if lacking:
        return (
            f"calibration.classes: expected names of the classes of every expert, received none "
            f"for {lacking[0]!r}; add them"
        )
    return None


def class_names(calibration: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Task -> names of its classes; "" stands for all.

    They are those that the recipe lists, or those of the column of class numbers.

    Raises:
        InputError: If nothing names them.
    """
    if "classes" in calibration:
        return by_task(calibration["classes"])
    data = calibration["data"]
    folders = data if isinstance(data, Mapping) else {"": data}
    found: dict[str, Sequence[str]] = {}
    for task, folder in folders.items():
        path = expanded(folder) / calibration["split"]
        names = _names_in(path, calibration["label"])
        if not names:
            raise InputError(
                f"calibration.classes: expected names of the classes, found none in {path}; list "
                "them in the order of their numbers, or name a ClassLabel column in label"
            )
        found[task] = names
    return found


def by_task(value: Any) -> dict[str, Sequence[str]]:
    """A list for all tasks, or one for each, as a mapping."""
    return dict(value) if isinstance(value, Mapping) else {"": value}


def heads_of(calibration: Mapping[str, Any], base: Any, model: Any) -> PromptHeads:
    """The heads of a calibration with prompts; texts run without padding.

    Args:
        calibration: The complete option.
        base: The base, whose tokenizer is used if no other is named.
        model: What the heads are for.

    Raises:
        InputError: If the model compares no texts, or there is no tokenizer.
    """
    if not compares_texts(model):
        raise InputError(
            "calibration.prompts: expected a model of images and texts such as CLIP, received "
            f"{type(model).__name__}; leave prompts out, or choose another model_class"
        )
    tokenizer = tokenizer_of(calibration, base)
    prompts = by_task(calibration["prompts"])
    return PromptHeads(prompts, class_names(calibration), tokenizer, by_length=True)


def tokenizer_of(calibration: Mapping[str, Any], base: Any) -> Any:
    """The tokenizer that is named, or the base's.

    Raises:
        InputError: If there is none.
    """
    folder = getattr(base, "folder", None)
    if "tokenizer" in calibration:
        path = Path(calibration["tokenizer"])
        folder = path if is_folder(path) else open_checkpoint(str(path), "tokenizer").folder
    return tokenizer_in(folder, f"calibration.tokenizer: {folder}")


def _names_in(folder: Path, column: str | None) -> list[str]:
    """Names of the classes in a column of a split, none if it has no names."""
    try:
        return class_names_of(folder).get(column, []) if column is not None else []
    except InputError:
        return []
