"""Which kinds of evaluators run which kinds of models, by the class that a checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.evaluators.spec.routing import OWN
from mergesearch.merging import InputError
from mergesearch.merging.models.model_classes import auto_classes, loads_as


@dataclass(frozen=True)
class ModelKind:
    """Models of one task.

    Attributes:
        suffixes: Ends of the names of their classes.
        auto: Their auto class in ``transformers``.
        use: What to write in the study file.
    """

    suffixes: tuple[str, ...]
    auto: str
    use: str


#: Ends of auto classes that load models of many tasks, which are named last.
GENERAL = ("MaskedLM", "PreTraining")
#: What programs and functions load where the study does not say.
DEFAULT = "AutoModelForCausalLM"
#: Models of images and texts that are compared, all of whose classes end in ``Model``.
DUAL_ENCODERS = (
    "CLIPModel",
    "SiglipModel",
    "Siglip2Model",
    "AlignModel",
    "BlipModel",
    "MetaClip2Model",
)
MODEL_KINDS = (
    ModelKind(DUAL_ENCODERS, "AutoModelForZeroShotImageClassification", "kind: zero_shot"),
    ModelKind(
        ("ForImageClassification",), "AutoModelForImageClassification", "kind: classification"
    ),
    ModelKind(
        ("ForSequenceClassification",),
        "AutoModelForSequenceClassification",
        "kind: text_classification",
    ),
    ModelKind(
        ("ForTokenClassification",),
        "AutoModelForTokenClassification",
        "kind: token_classification",
    ),
    ModelKind(
        ("ForSemanticSegmentation",), "AutoModelForSemanticSegmentation", "kind: segmentation"
    ),
    ModelKind(
        ("ForCausalLM", "LMHeadModel"),
        "AutoModelForCausalLM",
        "kind: perplexity, generation or lm_eval",
    ),
    ModelKind(("ForCTC",), "AutoModelForCTC", "kind: speech_recognition"),
    ModelKind(
        ("ForAudioClassification",), "AutoModelForAudioClassification", "kind: audio_classification"
    ),
    ModelKind(
        ("ForQuestionAnswering",), "AutoModelForQuestionAnswering", "kind: python or command"
    ),
    ModelKind(("ForMaskedLM",), "AutoModelForMaskedLM", "model_class: AutoModelForMaskedLM"),
)


def model_kind(architecture: str) -> ModelKind | None:
    """The kind of a model's class, or None where the table does not know it."""
    return next((kind for kind in MODEL_KINDS if architecture.endswith(kind.suffixes)), None)


def check_model_kind(
    model_class: str | None,
    config: Mapping[str, Any],
    sections: Sequence[Any],
    whose: str = "the base's",
) -> None:
    """Refuse evaluators that cannot run the models of a checkpoint, by its configuration alone.

    Only models that are known to be of another kind are refused.

    Args:
        model_class: The auto class that the evaluators load.
        config: The configuration of the base, or of the expert whose head is used.
        sections: The study's evaluators.
        whose: Model that is.

    Raises:
        InputError: In one line.
    """
    architectures = config.get("architectures") or []
    if model_class is None or not architectures:
        return
    found = str(architectures[0])
    kind = model_kind(found)
    if kind is None:
        _check_default(model_class, config, sections, whose)
    if kind is None or kind.auto == model_class:
        return
    wanted = next((known for known in MODEL_KINDS if known.auto == model_class), None)
    bare = model_class == "AutoModel" and kind.auto != MODEL_KINDS[0].auto
    if wanted is None and not bare:
        return
    if loads_as(model_class, config) == found:  # classifiers of audio end as those of texts do
        return
    index = next((n for n, section in enumerate(sections) if hasattr(section, "model_class")), 0)
    section = sections[index]
    settable = hasattr(section, "model_class")
    key = f"evaluators.{index}.{'model_class' if settable else 'kind'}"
    use = f"model_class: {kind.auto}" if settable else kind.use
    if kind.use.startswith("model_class") and not settable:
        use = "a checkpoint with such a head, or special: {heads: own} where experts have theirs"
    if bare and not settable:
        use = "a checkpoint of the encoder alone, as AutoModel saves it"
    if kind is MODEL_KINDS[0] and hasattr(section, "prompts"):
        use = "prompts, as kind: zero_shot has them"
    if kind.auto == DEFAULT and section.kind in OWN:
        kinds = "generation, language_model or lm_eval"
        use = f"kind: {kinds} with routing: {{method: {section.kind}}}"
    raise InputError(
        f"{key}: expected an evaluator of {whose} {found}, received {section.kind}, which loads "
        f"{model_class}; use {use}"
    )


def _check_default(
    model_class: str, config: Mapping[str, Any], sections: Sequence[Any], whose: str
) -> None:
    """Refuse the class that programs and functions get by default, where the model has its own.

    Raises:
        InputError: In one line.
    """
    found = str(config["architectures"][0])
    asked = (n for n, section in enumerate(sections) if section.kind in ("command", "python"))
    index = next(asked, None)
    if index is None or model_class != DEFAULT or loads_as(model_class, config) == found:
        return
    own = [name for name in auto_classes(config) if loads_as(name, config) == found]
    own.sort(key=lambda name: name.endswith(GENERAL))
    if own:
        raise InputError(
            f"evaluators.{index}.model_class: expected the class of {whose} {found}, received "
            f"{model_class}, which is loaded where none is named; use model_class: {own[0]}"
        )
