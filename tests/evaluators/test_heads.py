"""Items that are scored with the head of an expert: that of each domain, or of each member."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.evaluators import Batch, Candidate
from mergesearch.merging import InputError
from tests.evaluators.items import DOMAINS, build, candidate_at, classification, opened, pico_vit

NAMES = [*DOMAINS, "base"]


@pytest.fixture
def candidate() -> Candidate:
    """A model for each domain; the resident one is none of them."""
    heads = {name: pico_vit(seed) for seed, name in enumerate(DOMAINS, 1)}
    return replace(candidate_at([0.5], pico_vit(9)), heads=heads)


def test_every_domain_is_scored_with_its_head(data: Path, candidate: Candidate) -> None:
    section = classification(data, {"metric": "cross_entropy"}, batch_size=7)
    evaluator = opened(section)
    assert evaluator.use_heads(NAMES) == dict.fromkeys(DOMAINS, evaluator.model_class)
    scores = evaluator.evaluate(candidate, "search").items["cross_entropy"]
    for place, name in enumerate(DOMAINS):
        alone = opened(section).evaluate(
            Candidate(candidate.recipe, candidate.heads[name]), "search"
        )
        np.testing.assert_allclose(
            scores[place::2], alone.items["cross_entropy"][place::2], rtol=1e-5
        )
    few = np.array([0, 1, 5])
    some = evaluator.evaluate(candidate, "search", few).items["cross_entropy"]
    np.testing.assert_allclose(some, scores[few], rtol=1e-5)


def test_gradients_flow_into_the_model_of_each_domain(data: Path, candidate: Candidate) -> None:
    evaluator = opened(classification(data, {"metric": "cross_entropy"}))
    evaluator.use_heads(NAMES)
    evaluator.backward(candidate, Batch(), {"cross_entropy": 1.0})
    grads = [next(model.parameters()).grad for model in candidate.heads.values()]
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads)
    assert not torch.equal(grads[0], grads[1])
    assert next(candidate.model.parameters()).grad is None


def test_members_have_heads_of_their_own(data: Path, candidate: Candidate) -> None:
    sections = [
        classification(data, {"name": name, "metric": "cross_entropy"}, domain=None, head=head)
        for name, head in (("one", "day"), ("two", "night"))
    ]
    both = opened(*sections)
    assert set(both.use_heads(NAMES)) == {"day", "night"}
    measured = both.evaluate(candidate, "search").values
    for section, (name, head) in zip(sections, (("one", "day"), ("two", "night")), strict=True):
        plain = opened(section)
        own = Candidate(candidate.recipe, candidate.heads[head])
        assert measured[name] == plain.evaluate(own, "search").values[name]


def test_other_classes_need_a_head_each(data: Path) -> None:
    kinds = ("AutoModelForImageClassification", "AutoModelForCausalLM")

    def sections(*heads: str | None) -> list[dict[str, Any]]:
        return [
            {"kind": "entropy", "data": str(data), "model_class": kind, "head": head}
            | {"objectives": [{"name": kind}]}
            for kind, head in zip(kinds, heads, strict=True)
        ]

    with pytest.raises(
        InputError, match=r"one kind of model, received .* use two studies, or name"
    ):
        build(*sections(None, None))
    assert build(*sections("day", "night")).use_heads(NAMES) == dict(
        zip(("day", "night"), kinds, strict=True)
    )
    with pytest.raises(InputError, match="one kind of model around head 'day'"):
        build(*sections("day", "day")).use_heads(NAMES)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"head": "up"}, r"\.head: expected one of day, night, base, received 'up'"),
        ({"domain": None}, r"\.head: expected one of day, night, base, received none; write head"),
        ({"experts": {"day": "up"}}, "expected one of day, night, base for the items of domain"),
    ],
)
def test_heads_that_nobody_names(data: Path, section: Any, message: str) -> None:
    evaluator = build(classification(data, **section))
    evaluator.check()
    with pytest.raises(InputError, match=message):
        evaluator.use_heads(NAMES)


def test_a_head_without_heads_is_refused(data: Path) -> None:
    for section in (
        classification(data, head="day"),
        {"kind": "distance", "head": "day"},
        {"kind": "command", "command": "true", "head": "day", "model": "none"}
        | {"objectives": [{"name": "f", "direction": "minimize"}]},
    ):
        names = NAMES if section.get("model") == "none" else []
        with pytest.raises(InputError, match=r"evaluators\.0\.head: expected an evaluator that"):
            build(section).use_heads(names)
    assert build(classification(data)).use_heads([]) == {}
