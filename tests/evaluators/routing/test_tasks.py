"""Input-dependent merges on tasks of lm_eval: each document by the merge of its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.merging import InputError
from mergesearch.merging.routing.t3 import T3
from mergesearch.merging.routing.vectors import copied_tensors
from tests.evaluators.items import build, candidate_at, opened
from tests.evaluators.language import lm_section, make_tasks, make_tokenizer, text_llama

T3_ROUTING = {"routing": {"method": "t3"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    make_tokenizer(folder / "tokenizer")
    make_tasks(folder)
    return folder


def t3(per: str = "item") -> T3:
    sources = (copied_tensors(text_llama(seed)) for seed in (0, 1))
    return T3(text_llama(0), *sources, low=0.0, high=1.0, gamma=3.0, per=per)


def scores_of(section: dict[str, Any], model: Any, metric: str) -> Any:
    return opened(section).evaluate(candidate_at([0.1], model), "search").items[metric]


def test_documents_are_scored_by_the_merge_of_their_prompts(folder: Path) -> None:
    objectives = [{"metric": "acc"}, {"metric": "perplexity"}]
    section = lm_section(folder, "continue", objectives=objectives)
    routed = opened(section | T3_ROUTING)
    plain = opened(section)
    found = routed.evaluate(candidate_at([0.1], t3()), "search").items["perplexity"]
    by_hand = t3()
    prompts = routed._prompts(by_hand.model, "search", range(len(found)))  # type: ignore[attr-defined]
    expected = []
    weights = []
    for row, (ids, mask) in enumerate(zip(*prompts.values(), strict=True)):
        weights.append(by_hand.weights_for({"input_ids": ids[mask.bool()][None]})[0].tolist())
        by_hand.write(weights[-1])
        scores = plain.evaluate(candidate_at([0.1], by_hand.model), "search").items["perplexity"]
        expected.append(scores[row])
    assert len({round(one, 4) for (one,) in weights}) > 1
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for seed in (0, 1):
        assert not np.allclose(found, scores_of(section, text_llama(seed), "perplexity"), rtol=1e-3)


def test_checkpoints_beside_it_are_scored_as_they_are(folder: Path) -> None:
    section = lm_section(folder, "choose", "continue", objectives=[{"metric": "acc"}])
    expected = scores_of(section, text_llama(3), "acc")
    for method in ("t3", "twin_merging"):
        found = scores_of(section | {"routing": {"method": method}}, text_llama(3), "acc")
        np.testing.assert_array_equal(found, expected)


def test_a_batch_mixes_the_tasks_and_is_merged_once(folder: Path) -> None:
    routing = {"routing": {"method": "t3", "per": "batch"}}
    section = lm_section(folder, "choose", "continue", objectives=[{"metric": "acc"}], batch_size=8)
    evaluator = opened(section | routing)
    model = t3("batch")
    merges = []
    write = model.write
    model.write = lambda weights: merges.append(weights) or write(weights)  # type: ignore[method-assign, func-returns-value]
    evaluator.evaluate(candidate_at([0.1], model), "search")
    assert len(merges) == -(-evaluator.size("search") // 8)


def test_a_router_learns_the_task_of_each_prompt(folder: Path) -> None:
    section = lm_section(folder, "choose", "write", max_items=9)
    evaluator = opened(section | {"routing": {"method": "twin_merging"}})
    domains, batches = evaluator.seen_by_router(text_llama(0), 4)  # type: ignore[attr-defined]
    assert {*evaluator.search_domains()} == {*domains} == {"choose", "write"}  # type: ignore[attr-defined]
    sizes = [len(batch["input_ids"]) for batch in batches]
    assert sizes == [4, 4, 1]
    assert len(domains) == 9


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("read", r"tasks: expected tasks with prompts for t3, .*'read', whose texts are scored"),
        ({"task": "choose", "tier": "two"}, "'choose', which lm_eval's own loop scores"),
    ],
)
def test_tasks_without_prompts_are_refused(folder: Path, task: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        build(lm_section(folder, task) | T3_ROUTING).check()
    assert "\n" not in str(refused.value)
