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


#: The auto class of models that are told by boxes or points what to cut out.
PROMPTABLE = "AutoModelForMaskGeneration"
AUDIO = Task("audio", ("ForAudioClassification",), "classifiers of recordings")
TASKS = (
    Task("zero_shot", DUAL_ENCODERS, "models of pictures and texts"),
    Task("images", ("ForImageClassification",), "classifiers of pictures"),
    Task("texts", ("ForSequenceClassification",), "classifiers of texts"),
    Task("words", ("ForTokenClassification",), "classifiers of words"),
    Task("language", ("ForCausalLM", "LMHeadModel"), "causal language models"),
    Task("writing", ("ForConditionalGeneration",), "encoder-decoders"),
    AUDIO,
    Task("masks", ("ForSemanticSegmentation",), "models of masks"),
    Task("hearing", ("ForCTC",), "models that hear speech"),
    Task("questions", (), "models that answer questions about pictures"),
    Task("encoding", (), "encoders of texts without a head"),
)
#: Task -> auto classes that tell it where no end of a name does.
AUTO = {
    "masks": (PROMPTABLE,),
    "hearing": ("AutoModelForSpeechSeq2Seq",),
    "questions": ("AutoModelForImageTextToText",),
}


def task_of(config: Mapping[str, Any], path: str) -> Task:
    """The task of a model by its configuration.

    Raises:
        InputError: If nothing can be proposed for it.
    """
    name = str((config.get("architectures") or [""])[0])
    if loads_as("AutoModelForAudioClassification", config) == name:
        return AUDIO
    ends = (task for task in TASKS if task.ends and name.endswith(task.ends))
    found = next(ends, None)
    if found is not None and found.name == "writing" and not _writes(config, name):
        found = None
    found = found or next((task for task in TASKS if _is_made(task.name, config, name)), None)
    if found is None:
        known = ", ".join(task.shown for task in TASKS)
        raise InputError(
            f"models: {path}: expected {known}, received {name or 'no config.json with a class'}; "
            "write the study by hand for other models, with kind: python or command "
            "(`mergesearch help evaluators.python`)"
        )
    return found


def _is_made(task: str, config: Mapping[str, Any], name: str) -> bool:
    """Whether an auto class of a task makes the class of a model."""
    if task == "encoding":
        words = "vocab_size" in config and not config.get("is_encoder_decoder")
        return words and loads_as("AutoModel", config) == name
    return any(loads_as(auto, config) == name for auto in AUTO.get(task, ()))


def _writes(config: Mapping[str, Any], name: str) -> bool:
    return loads_as("AutoModelForSeq2SeqLM", config) == name
