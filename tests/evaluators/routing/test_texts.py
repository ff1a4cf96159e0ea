"""Input-dependent merges as language models: the items, by the merge of each prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import InputError
from mergesearch.merging.routing.t3 import T3
from mergesearch.merging.routing.vectors import copied_tensors
from tests.evaluators.items import build, candidate_at, opened, pico_llama, save, token_splits
from tests.evaluators.texts import text_folder, text_llama

RULE = {"low": 0.0, "high": 1.0, "gamma": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = text_folder(tmp_path_factory.mktemp("texts"))
    save(folder / "tokens", token_splits())
    return folder


def written(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "kind": "generation",
        "data": "texts",
        "tokenizer": str(folder / "tokenizer"),
        "target": "target",
        "domain": "domain",
        "scorer": "tests.evaluators.routing.test_texts:numbered",
        "max_new_tokens": 5,
        "batch_size": 3,
    } | options


def scored(**options: Any) -> dict[str, Any]:
    columns = {"data": "tokens", "labels": "labels", "domain": "domain", "batch_size": 3}
    return {"kind": "language_model", "routing": {"method": "t3"}} | columns | options


def numbered(prediction: str, target: str | None, prompt: str) -> float:
    """A number that differs between texts."""
    return float(sum(index * ord(letter) for index, letter in enumerate(prediction)) % 997)


def routed(make: Any, per: str = "item") -> T3:
    return T3(make(0), *(copied_tensors(make(seed)) for seed in (0, 1)), per=per, **RULE)


def test_texts_are_written_by_the_merge_of_their_prompts(folder: Path) -> None:
    plain = opened(written(folder), folder=folder)
    evaluator = opened(written(folder, routing={"method": "t3"}), folder=folder)
    model = routed(text_llama)
    scores = evaluator.evaluate(candidate_at([0.0], model), "test").items["score"]
    items = plain._items["test"]  # type: ignore[attr-defined]
    expected = []
    for row, tokens in enumerate(items.tokens):
        model.write(model.weights_for({"input_ids": tokens[None]})[0].tolist())
        [text] = plain.written(model.model, items.rows(np.array([row])))  # type: ignore[attr-defined]
        expected.append(numbered(text.text, None, ""))
    np.testing.assert_array_equal(scores, expected)
    ends = [
        plain.evaluate(candidate_at([0.0], text_llama(seed)), "test").items["score"]
        for seed in (0, 1)
    ]
    assert all((scores != end).any() for end in ends)


def test_tokens_are_scored_by_the_merge_of_those_before_them(folder: Path) -> None:
    evaluator = opened(scored(), folder=folder)
    model = routed(pico_llama)
    losses = evaluator.evaluate(candidate_at([0.0], model), "test").items["cross_entropy"]
    for row, ids in enumerate(token_splits()["test"]["input_ids"]):
        tokens = torch.tensor([ids])
        model.write(model.weights_for({"input_ids": tokens[:, :2]})[0].tolist())
        with torch.no_grad():
            log_p = model.model(input_ids=tokens).logits[0].log_softmax(-1)
        own = [-float(log_p[place - 1, ids[place]]) for place in range(2, len(ids))]
        assert losses[row] == pytest.approx(np.mean(own), abs=1e-5)


def test_checkpoints_beside_it_are_scored_as_they_are(folder: Path) -> None:
    pairs = [
        (written(folder), written(folder, routing={"method": "twin_merging"}), text_llama(0)),
        ({**scored(), "routing": None}, scored(), pico_llama(0)),
    ]
    for plain, section, model in pairs:
        values = [
            dict(opened(one, folder=folder).evaluate(candidate_at([0.0], model), "test").values)
            for one in (plain, section)
        ]
        assert list(values[0].values()) == pytest.approx(list(values[1].values()), abs=1e-6)


def test_a_batch_is_merged_once(folder: Path) -> None:
    evaluator = opened(written(folder, routing={"method": "t3", "per": "batch"}), folder=folder)
    seen: list[int] = []

    class Recorder(T3):
        def weights_for(self, inputs: Any, tasks: Any = None) -> torch.Tensor:
            weights = super().weights_for(inputs, tasks)
            seen.append(len(weights.unique()))
            return weights

    sources = (copied_tensors(text_llama(seed)) for seed in (0, 1))
    model = Recorder(text_llama(0), *sources, per="batch", **RULE)
    evaluator.evaluate(candidate_at([0.0], model), "test")
    assert seen == [1, 1, 1]  # 8 items, 3 at a time


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"engine": "vllm", "routing": {"method": "t3"}}, "routing: expected engine: transformers"),
        ({"routing": {"method": "t3", "router_width": 8}}, "router_width: expected method: twin"),
        ({"routing": {"method": "twin_merging", "centred": True}}, "centred: expected method: t3"),
        ({"kind": "language_model", "routing": {"method": "t3"}}, "labels: required key"),
        ({"domain": None, "routing": {"method": "twin_merging"}}, "domain: required key"),
    ],
)
def test_sections_that_do_not_fit_are_refused(
    folder: Path, section: dict[str, Any], message: str
) -> None:
    whole = written(folder) | section
    if whole["kind"] == "language_model":
        whole = {"kind": "language_model", "data": "tokens", "routing": section["routing"]}
    with pytest.raises((InputError, ValueError), match=message):
        build(whole, folder=folder)


def test_sections_without_it_are_those_of_older_studies(folder: Path) -> None:
    from mergesearch.evaluators.spec.evaluators import parse_evaluators

    plain = {**scored()}
    del plain["routing"]
    for section in (written(folder), plain):
        [parsed] = parse_evaluators([section])
        assert "routing" not in parsed.model_dump()
