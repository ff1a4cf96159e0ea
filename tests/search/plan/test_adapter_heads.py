"""Plans of studies whose experts are adapters with heads of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import InputError
from mergesearch.search.plan.heads import used_heads
from mergesearch.search.plan.planning import plan_study
from tests.evaluators.language import make_tokenizer
from tests.merging.checkpoints.test_adapter import GOLDEN
from tests.merging.export.test_adapter_heads import adapter_of
from tests.search.studies import spec_of

CLASSES = {"mood": ["bad", "good"], "topic": ["sport", "news", "stock"]}


@pytest.fixture
def study(tmp_path: Path) -> dict[str, Any]:
    """Two text classifiers around a masked language model, whose folders name their classes."""
    base = GOLDEN / "distilbert"
    experts = {
        name: f"{base}+{adapter_of('distilbert', tmp_path / name, len(own), seed, own)}"
        for seed, (name, own) in enumerate(CLASSES.items())
    }
    for name, own in CLASSES.items():
        rows = "".join(f"a {k} b,{own[k % len(own)]}\n" for k in range(12))
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    make_tokenizer(tmp_path / "tokenizer")
    return {
        "name": "adapters",
        "base": str(base),
        "experts": experts,
        "special": {"heads": "own"},
        "space": {"granularity": "task"},
        "strategy": "cma_es",
        "evaluators": [
            {
                "kind": "text_classification",
                "data": str(tmp_path / f"{name}.csv"),
                "head": name,
                "tokenizer": str(tmp_path / "tokenizer"),
                "objectives": [{"name": name, "metric": "accuracy"}],
            }
            for name in CLASSES
        ],
        "budget": {"trials": 20},
    }


def test_heads_and_classes_are_the_adapters(study: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(study, tmp_path)
    owners = [section.data.processor for section in spec.evaluators]
    assert owners == [*study["experts"].values()]
    plan = plan_study(spec)
    heads = used_heads(plan.heads, plan.evaluator)
    assert {name: head.size for name, head in heads.items()} == {
        name: 8 * 8 + 8 + 9 * len(own) for name, own in CLASSES.items()
    }


def test_classes_that_an_adapter_lacks(study: dict[str, Any], tmp_path: Path) -> None:
    study["evaluators"][0]["head"] = "topic"
    study["evaluators"][1]["head"] = "mood"
    with pytest.raises(
        InputError, match=r"expected classes among .'sport', 'news', 'stock'., received"
    ):
        plan_study(spec_of(study, tmp_path))


def test_evaluators_of_another_kind_than_the_head(study: dict[str, Any], tmp_path: Path) -> None:
    other = {"kind": "distance", "model_class": "AutoModelForTokenClassification", "head": "mood"}
    study["evaluators"] = [other]
    message = "expected an evaluator of expert mood's DistilBertForSequenceClassification"
    with pytest.raises(InputError, match=message) as caught:
        plan_study(spec_of(study, tmp_path))
    assert "\n" not in str(caught.value)


def test_evaluators_whose_class_does_not_load_the_head(
    study: dict[str, Any], tmp_path: Path
) -> None:
    study["evaluators"] = [
        {
            "kind": "sequence_to_sequence",
            "data": str(tmp_path / "mood.csv"),
            "target": "label",
            "tokenizer": str(tmp_path / "tokenizer"),
            "head": "mood",
        }
    ]
    message = "expected a class that loads expert mood, which is of type distilbert, received"
    with pytest.raises(InputError, match=f"evaluators.0.kind: {message}") as caught:
        plan_study(spec_of(study, tmp_path))
    assert "\n" not in str(caught.value)
