"""Perplexity on texts: against a token by token loop, windows, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators import Batch
from mergesearch.evaluators.items import resamples
from mergesearch.evaluators.text import token_scores
from mergesearch.evaluators.text.perplexity import windows
from mergesearch.merging import InputError
from tests.evaluators.items import build, candidate_at, opened, save
from tests.evaluators.measuring import Counter, batch_sizes
from tests.evaluators.texts import text_folder, text_llama, text_splits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def model() -> Any:
    return text_llama()


def section(folder: Path, **options: Any) -> dict[str, Any]:
    columns = {
        "data": "texts",
        "tokenizer": str(folder / "tokenizer"),
        "objectives": [{"metric": "log_perplexity"}],
    }
    return {"kind": "perplexity", "domain": "domain", "id": "id"} | columns | options


def naive(model: Any, folder: Path, split: str, length: int, stride: int) -> list[float]:
    """Nats per token of each text, one forward pass for every token."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    scores = []
    for text in text_splits()[split]["text"]:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        total = 0.0
        position = 1
        while position < len(ids):
            # The first window whose reach includes the token that is predicted.
            start = next(s for s in range(0, len(ids), stride) if s + length >= position)
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids[start:position]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[ids[position]])
            position += 1
        scores.append(total / (len(ids) - 1))
    return scores


@pytest.mark.parametrize(("length", "stride"), [(64, None), (5, None), (6, 3), (4, 1)])
def test_agrees_with_a_loop_over_tokens(
    folder: Path, model: Any, length: int, stride: int | None
) -> None:
    evaluator = opened(
        section(folder, max_length=length, stride=stride, batch_size=3), folder=folder
    )
    measured = evaluator.evaluate(candidate_at([1], model), "search")
    expected = naive(model, folder, "search", length, stride or length)
    np.testing.assert_allclose(measured.items["log_perplexity"], expected, rtol=1e-5)
    assert measured.values["log_perplexity"] == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 20])
def test_windows_count_every_token_once(count: int, stride: int) -> None:
    made = windows(count, 7, stride)
    assert [token for w in made for token in range(w.counted, w.stop)] == list(range(count))
    assert all(w.start <= w.counted < w.stop <= w.start + 7 for w in made)


def test_more_context_is_not_read_twice(folder: Path, model: Any) -> None:
    whole = opened(section(folder), folder=folder).evaluate(candidate_at([1], model), "test")
    wide = opened(section(folder, max_length=64, stride=1), folder=folder).evaluate(
        candidate_at([1], model), "test"
    )
    assert whole.values == wide.values


def test_weights_are_tokens(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    counts = [
        len(tokenizer.encode(text, add_special_tokens=False))
        for text in text_splits()["test"]["text"]
    ]
    assert opened(section(folder), folder=folder).weights("test").tolist() == counts  # type: ignore[attr-defined]


def test_the_same_twice_and_in_other_batches(folder: Path, model: Any) -> None:
    one, two, other = (opened(section(folder, batch_size=n), folder=folder) for n in (3, 3, 1))
    first = one.evaluate(candidate_at([1], model), "search")
    np.testing.assert_array_equal(
        first.items["log_perplexity"],
        two.evaluate(candidate_at([1], model), "search").items["log_perplexity"],
    )
    np.testing.assert_allclose(
        first.items["log_perplexity"],
        other.evaluate(candidate_at([1], model), "search").items["log_perplexity"],
        rtol=1e-5,
    )


def test_gradient_is_that_of_the_value(folder: Path) -> None:
    model = text_llama().double()
    evaluator = opened(section(folder, max_length=6, stride=4, batch_size=3), folder=folder)
    assert evaluator.differentiable == ("log_perplexity",)
    slope = evaluator.backward(candidate_at([1], model), Batch(), {"log_perplexity": 1.0})
    assert slope.loss == pytest.approx(
        evaluator.evaluate(candidate_at([1], model), "search").values["log_perplexity"]
    )
    weight = model.model.norm.weight
    step = 1e-6
    values = []
    for sign in (1, -1):
        weight.data[3] += sign * step
        values.append(
            evaluator.evaluate(candidate_at([1], model), "search").values["log_perplexity"]
        )
        weight.data[3] -= sign * step
    assert float(weight.grad[3]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluators\.0\.tokenizer: required key is missing"):
        build(section(folder, tokenizer=None), folder=folder).check()
    with pytest.raises(InputError, match="stride: expected at most max_length"):
        build(section(folder, max_length=4, stride=5), folder=folder)
    with pytest.raises(InputError, match="expected a column 'words'"):
        build(section(folder, text="words"), folder=folder).check()
    splits = text_splits()
    splits["test"]["text"][2] = ""
    save(tmp_path / "empty", splits)
    with pytest.raises(
        InputError, match=r"expected texts of at least one token, received '' \(item 2\)"
    ):
        opened(section(folder, data=str(tmp_path / "empty")), folder=folder)
    for rows in splits.values():
        rows["text"] = list(range(len(rows["text"])))
    save(tmp_path / "numbers", splits)
    with pytest.raises(InputError, match="expected texts in column 'text', received int64"):
        build(section(folder, data=str(tmp_path / "numbers")), folder=folder).check()


def test_texts_of_two_splits_are_known_by_their_hash(folder: Path, tmp_path: Path) -> None:
    splits = text_splits()
    splits["test"]["text"][0] = splits["search"]["text"][1]
    save(tmp_path / "same", splits)
    with pytest.raises(InputError, match="expected disjoint splits, received 1 items"):
        build(section(folder, data=str(tmp_path / "same"), id=None), folder=folder).check()
    splits["test"]["text"][0] = None
    save(tmp_path / "missing", splits)
    with pytest.raises(InputError, match="expected a text for every item in column 'text'"):
        build(section(folder, data=str(tmp_path / "missing")), folder=folder).check()


def test_perplexity_is_that_of_all_texts_together(folder: Path, model: Any) -> None:
    both = opened(
        section(folder, objectives=[{"metric": "log_perplexity"}, {"domains": ["day"]}]),
        folder=folder,
    )
    made = both.evaluate(candidate_at([1], model), "search")
    day = np.array(text_splits()["search"]["domain"]) == "day"
    nats = made.items["log_perplexity"][day]
    tokens = both.weights("search")[day]
    assert made.values["perplexity[day]"] == pytest.approx(np.exp(nats @ tokens / tokens.sum()))
    assert made.errors["perplexity[day]"] > 0
    assert both.additive == ("log_perplexity",)
    assert both.differentiable == ("log_perplexity",)


@pytest.mark.parametrize("stride", [None, 3])
def test_logits_in_parts_change_nothing(
    folder: Path, model: Any, stride: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = opened(section(folder, max_length=8, stride=stride), folder=folder)
    whole = evaluator.evaluate(candidate_at([1], model), "search")
    monkeypatch.setattr(token_scores, "CPU_HEAD_BYTES", 7 * 8 * 300)  # seven positions at once
    parts = evaluator.evaluate(candidate_at([1], model), "search")
    np.testing.assert_allclose(
        parts.items["log_perplexity"], whole.items["log_perplexity"], rtol=1e-6
    )
    slope = evaluator.backward(candidate_at([1], text_llama()), Batch(), {"log_perplexity": 1.0})
    assert slope.loss == pytest.approx(whole.values["log_perplexity"], rel=1e-6)


def test_batches_of_few_tokens(folder: Path, model: Any) -> None:
    whole, few = (
        opened(section(folder, max_length=12, batch_tokens=n), folder=folder) for n in (None, 30)
    )
    expected = whole.evaluate(candidate_at([1], model), "search")
    with batch_sizes(model) as sizes:
        found = few.evaluate(candidate_at([1], model), "search")
    assert len(sizes) > 2
    assert max(sizes) <= 30
    np.testing.assert_allclose(
        found.items["log_perplexity"], expected.items["log_perplexity"], rtol=1e-5
    )


def test_nothing_of_ours_waits_for_the_device(folder: Path, model: Any) -> None:
    evaluator = opened(section(folder, batch_size=3), folder=folder)
    evaluator.evaluate(candidate_at([1], model), "search")
    with Counter() as counter, batch_sizes(model) as sizes:
        evaluator.evaluate(candidate_at([1], model), "search")
    # Transformers asks twice in every pass whether its mask can be left out.
    assert counter.waits == 2 * len(sizes) == 6


def test_gradients_after_a_value_of_the_same_texts(folder: Path) -> None:
    evaluator = opened(section(folder, domain=None, max_items=1), folder=folder)
    candidate = candidate_at([1], text_llama())
    value = evaluator.evaluate(candidate, "search").values["log_perplexity"]
    slope = evaluator.backward(candidate, Batch(), {"log_perplexity": 1.0})
    assert slope.loss == pytest.approx(value, rel=1e-6)
    assert candidate.model.model.norm.weight.grad.abs().sum() > 0


def test_held_out_perplexity_is_known_on_resamples_of_whole_texts(folder: Path, model: Any) -> None:
    evaluator = opened(
        section(folder, objectives=[{"metric": "perplexity", "domains": ["day"]}]), folder=folder
    )
    measured = evaluator.evaluate(candidate_at([1], model), "test")
    (name,) = measured.values
    rows = np.flatnonzero(np.array(text_splits()["test"]["domain"]) == "day")
    tokens = evaluator.weights("test")[rows]  # type: ignore[attr-defined]
    nats = measured.items[name]
    expected = [
        np.exp(tokens[drawn] @ nats[drawn] / tokens[drawn].sum())
        for drawn in resamples("day", len(rows))
    ]
    np.testing.assert_allclose(measured.resampled[name], expected, rtol=1e-12)
    assert evaluator.evaluate(candidate_at([1], model), "search").resampled == {}
