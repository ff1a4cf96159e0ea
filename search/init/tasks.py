"""What models of a class are for, and what is measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergesearch.evaluators.spec.model_kinds import DUAL_ENCODERS
from mergesearch.merging import InputError
from mergesearch.merging.models.model_classes import loads_as


@dataclass(frozen=True)
class Task:
    """What models of some classes do.

    Attributes:
        name: What it is called here.
        ends: Ends of the names of the classes.
        shown: What the models are, for people.
    """

    name: str
    ends: tuple[str, ...]
    shown: str


AUDIO = Task("audio", ("ForAudioClassification",), "classifiers of recordings")
TASKS = (
    Task("zero_shot", DUAL_ENCODERS, "models of pictures and texts"),
    Task("images", ("ForImageClassification",), "classifiers of pictures"),
    Task("texts", ("ForSequenceClassification",), "classifiers of texts"),
    Task("words", ("ForTokenClassification",), "classifiers of words"),
    Task("language", ("ForCausalLM", "LMHeadModel"), "causal language models"),
    Task("writing", ("ForConditionalGeneration",), "encoder-decoders"),
    AUDIO,
)


def task_of(config: Mapping[str, Any], path: str) -> Task:
    """The task of a model by its configuration.

    Raises:
        InputError: If nothing can be proposed for it.
    """
    name = str((config.get("architectures") or [""])[0])
    if loads_as("AutoModelForAudioClassification", config) == name:
        return AUDIO
    found = next((task for task in TASKS if name.endswith(task.ends)), None)
    if found is None or (found.name == "writing" and not _writes(config, name)):
        known = ", ".join(task.shown for task in TASKS)
        raise InputError(
            f"models: {path}: expected {known}, received {name or 'no config.json with a class'}; "
            "write the study by hand for other models, with kind: python or command "
            "(`mergesearch help evaluators.python`)"
        )
    return found


def _writes(config: Mapping[str, Any], name: str) -> bool:
    return loads_as("AutoModelForSeq2SeqLM", config) == name
