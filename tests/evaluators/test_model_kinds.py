"""A checkpoint of another kind than the evaluators run is refused by its configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mergesearch.evaluators.spec.evaluators import EVALUATORS
from mergesearch.evaluators.spec.model_kinds import MODEL_KINDS, check_model_kind
from mergesearch.merging import InputError

FIXED = SimpleNamespace(kind="classification")
OPEN = SimpleNamespace(kind="entropy", model_class="AutoModel")


def refusal(model_class: str, architecture: str, section: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_model_kind(model_class, {"architectures": [architecture]}, [section])
    return str(caught.value)


def test_other_kinds_are_refused_with_the_kind_to_use() -> None:
    message = refusal("AutoModelForImageClassification", "CLIPModel", FIXED)
    assert message == (
        "evaluators.0.kind: expected an evaluator of the base's CLIPModel, received "
        "classification, which loads AutoModelForImageClassification; use kind: zero_shot"
    )
    message = refusal("AutoModelForCausalLM", "BertForSequenceClassification", FIXED)
    assert message.endswith("use kind: text_classification")


def test_no_advice_names_a_key_that_the_evaluator_lacks() -> None:
    text = "AutoModelForSequenceClassification"
    message = refusal(text, "BertForMaskedLM", SimpleNamespace(kind="text_classification"))
    assert message.endswith(
        "use a checkpoint with such a head, or special: {heads: own} where experts have theirs"
    )
    assert refusal(text, "BertForMaskedLM", OPEN).endswith("use model_class: AutoModelForMaskedLM")


def test_bare_models_of_checkpoints_with_a_head_are_refused() -> None:
    message = refusal("AutoModel", "LlamaForCausalLM", OPEN)
    assert message.startswith("evaluators.0.model_class: expected an evaluator of the base's Llama")
    assert message.endswith("which loads AutoModel; use model_class: AutoModelForCausalLM")


@pytest.mark.parametrize(
    ("model_class", "architectures"),
    [
        ("AutoModelForImageClassification", ["ViTForImageClassification"]),
        ("AutoModelForZeroShotImageClassification", ["CLIPModel"]),
        ("AutoModel", ["CLIPModel"]),
        ("AutoModel", ["BertModel"]),
        ("AutoModelForCausalLM", ["Gemma3ForConditionalGeneration"]),
        ("AutoModelForCausalLM", ["SomethingNew"]),
        ("AutoModelForMaskGeneration", ["SamModel"]),
        ("a.module:function", ["BertForMaskedLM"]),
        (None, ["CLIPModel"]),
        ("AutoModelForCausalLM", None),
    ],
)
def test_what_may_run_is_left_alone(
    model_class: str | None, architectures: list[str] | None
) -> None:
    check_model_kind(model_class, {"architectures": architectures}, [FIXED])


def test_advice_names_kinds_that_exist() -> None:
    for kind in MODEL_KINDS:
        key, _, names = kind.use.partition(": ")
        words = names.replace(",", "").replace(" or ", " ").split()
        assert key == "model_class" or set(words) <= set(EVALUATORS)
