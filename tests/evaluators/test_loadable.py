"""Models that the evaluators cannot load are refused by the configuration of the base."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mergesearch.evaluators.spec.evaluators import parse_evaluators
from mergesearch.evaluators.spec.loadable import check_loadable
from mergesearch.evaluators.spec.model_kinds import check_model_kind
from mergesearch.merging import CheckpointError, InputError

DISTANCE: dict[str, Any] = {"kind": "distance"}
PERPLEXITY: dict[str, Any] = {"kind": "perplexity", "data": "texts.csv"}
MADE = "models:made"
PYTHON: dict[str, Any] = {"kind": "python", "function": "models:score", "model_class": MADE}


def check(model_class: str | None, config: dict[str, Any], *sections: dict[str, Any]) -> None:
    base: Any = SimpleNamespace(path="base", config=config)
    check_loadable(model_class, base, parse_evaluators(sections))


@pytest.mark.parametrize(
    ("model_class", "config", "section", "message"),
    [
        (
            "AutoModelForCausalLM",
            {"model_type": "sam", "architectures": ["SamModel"]},
            DISTANCE,
            (
                "evaluators.0.model_class: expected a class that loads the base, which is of type "
                "sam, received AutoModelForCausalLM; use AutoModelForMaskGeneration"
            ),
        ),
        (
            "AutoModelForCausalLM",
            {"model_type": "sam"},
            PERPLEXITY,
            (
                "evaluators.0.kind: expected a class that loads the base, which is of type sam, "
                "received AutoModelForCausalLM; use AutoModelForMaskGeneration"
            ),
        ),
        (
            "AutoModelForNothing",
            {"model_type": "llama"},
            DISTANCE | {"model_class": "AutoModelForNothing"},
            r"evaluators.0.model_class: model class: expected a transformers auto class",
        ),
        (
            "AutoModelForCausalLM",
            {"model_type": "of tomorrow"},
            DISTANCE,
            r"base: config.json: expected a model_type of transformers .*received 'of tomorrow'",
        ),
        ("AutoModelForCausalLM", {}, DISTANCE, r"base: expected a folder with config.json"),
        (
            MADE,
            {},
            DISTANCE | {"model_class": MADE},
            r"evaluators.0.model_class: expected an auto class .* is for kind: python",
        ),
    ],
)
def test_what_run_would_refuse(
    model_class: str, config: dict[str, Any], section: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, CheckpointError), match=message):
        check(model_class, config, section)


def test_what_may_be_loaded() -> None:
    check("AutoModelForCausalLM", {"model_type": "llama"}, PERPLEXITY)
    check("AutoModelForImageTextToText", {"model_type": "gemma3"}, DISTANCE)
    check(None, {}, {"kind": "synthetic", "problem": "sphere"})
    check(MADE, {}, PYTHON, DISTANCE | {"model_class": MADE})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("wav2vec2", "Wav2Vec2ForSequenceClassification"),
        ("hubert", "HubertForSequenceClassification"),
    ],
)
def test_classifiers_of_audio_that_are_called_as_those_of_texts(model_type: str, name: str) -> None:
    section = SimpleNamespace(kind="audio_classification")
    config = {"model_type": model_type, "architectures": [name]}
    check_model_kind("AutoModelForAudioClassification", config, [section])
    with pytest.raises(InputError, match="use kind: "):
        check_model_kind("AutoModelForImageClassification", config, [section])
