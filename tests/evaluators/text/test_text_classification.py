"""Classes of texts, pairs and words agree with plain loops and with scikit-learn's F1 score."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from mergesearch.evaluators import Batch, Evaluator
from mergesearch.evaluators.metrics.answers import f1_counts, macro_f1
from mergesearch.evaluators.metrics.correlation import pearson, spearman
from mergesearch.evaluators.pooling import jackknife_error
from mergesearch.evaluators.spec.evaluators import parse_evaluators
from mergesearch.merging import InputError
from tests.evaluators.classified import CLASSES, classified_folder, pico_bert
from tests.evaluators.items import build, candidate_at, opened

SPLITS = ("search", "validation", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classified_folder(tmp_path_factory.mktemp("classified"))


def section(folder: Path, kind: str, *metrics: str, **options: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "data": str(folder / "texts.jsonl"),
        "tokenizer": str(folder / "tokenizer"),
        "batch_size": 5,
        "objectives": [{"metric": metric} for metric in metrics],
        **options,
    }


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def logits_of(evaluator: Evaluator, model: Any, folder: Path, *columns: str) -> torch.Tensor:
    """Logits of the search items, one at a time."""
    loaded = evaluator._tables.load("search")  # type: ignore[attr-defined]
    tokenizer = tokenizer_of(folder)
    rows = []
    for texts in zip(*(loaded[column] for column in columns), strict=True):
        with torch.no_grad():
            rows.append(model(**tokenizer(*texts, return_tensors="pt")).logits[0])
    return torch.stack(rows)


@pytest.mark.parametrize("columns", [["text"], ["text", "pair"]])
def test_texts_and_pairs(folder: Path, columns: list[str]) -> None:
    model = pico_bert("sequence").double()
    options = {"pair": "pair"} if "pair" in columns else {}
    evaluator = opened(
        section(folder, "text_classification", "accuracy", "cross_entropy", "f1", **options)
    )
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    logits = logits_of(evaluator, model, folder, *columns)
    labels = torch.from_numpy(evaluator._tables.load("search")["label"])  # type: ignore[attr-defined]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    answers = logits.argmax(dim=1)
    np.testing.assert_array_equal(measured.items["accuracy"], (answers == labels).double())
    np.testing.assert_allclose(measured.items["cross_entropy"], losses, rtol=1e-6)
    expected = f1_score(labels, answers, average="macro")
    assert 0 < expected < 1
    assert measured.values["f1"] == pytest.approx(expected, rel=1e-12)
    assert measured.errors["f1"] > 0
    assert evaluator.additive == ("accuracy", "cross_entropy")


def test_texts_longer_than_the_model_reads(folder: Path) -> None:
    model = pico_bert("sequence", positions=3)
    evaluator = opened(section(folder, "text_classification", "accuracy"))
    with pytest.raises(InputError, match=r"texts of at most 3 tokens, .* cut them with max_length"):
        evaluator.evaluate(candidate_at([0.0], model), "search")
    cut = opened(section(folder, "text_classification", "accuracy", max_length=3))
    assert cut.evaluate(candidate_at([0.0], model), "search").values


def test_numbers_and_their_correlation(folder: Path) -> None:
    model = pico_bert("sequence", num_labels=1).double()
    names = ("spearman", "pearson", "squared_error")
    evaluator = opened(section(folder, "text_classification", *names, number="score"))
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    answers = logits_of(evaluator, model, folder, "text")[:, 0].numpy()
    numbers = evaluator._tables.load("search")["number"]  # type: ignore[attr-defined]
    assert measured.values["spearman"] == pytest.approx(spearmanr(answers, numbers)[0], rel=1e-9)
    assert measured.values["pearson"] == pytest.approx(
        np.corrcoef(answers, numbers)[0, 1], rel=1e-6
    )
    assert measured.values["squared_error"] == pytest.approx(
        ((answers - numbers) ** 2).mean(), rel=1e-6
    )
    assert evaluator.additive == ("squared_error",)
    assert evaluator.differentiable == ("squared_error",)
    with pytest.raises(InputError, match="expected a model with one answer"):
        evaluator.evaluate(candidate_at([0.0], pico_bert("sequence")), "search")


def test_words(folder: Path) -> None:
    model = pico_bert("token").double()
    evaluator = opened(section(folder, "token_classification", "accuracy", "cross_entropy", "f1"))
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    loaded = evaluator._tables.load("search")  # type: ignore[attr-defined]
    tokenizer = tokenizer_of(folder)
    every_answer: list[int] = []
    every_tag: list[int] = []
    for index, (words, tags) in enumerate(zip(loaded["words"], loaded["tags"], strict=True)):
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        assert any(len(piece) > 1 for piece in pieces)
        starts = np.cumsum([0, *map(len, pieces)])[:-1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(chain(*pieces))])).logits[0, starts]
        answers = logits.argmax(dim=1).tolist()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tags))
        assert measured.items["cross_entropy"][index] == pytest.approx(loss.item(), rel=1e-6)
        assert measured.items["accuracy"][index] == np.mean(np.equal(answers, tags))
        every_answer += answers
        every_tag += tags
    expected = f1_score(every_tag, every_answer, average="macro")
    assert measured.values["f1"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["text_classification", "token_classification"])
def test_the_gradient_is_that_of_the_loss(folder: Path, kind: str) -> None:
    model = pico_bert(kind.split("_")[0].replace("text", "sequence")).double()
    evaluator = opened(section(folder, kind, "cross_entropy", "f1"))
    assert evaluator.differentiable == ("cross_entropy",)
    candidate = candidate_at([0.0], model)
    result = evaluator.backward(candidate, Batch(), {"cross_entropy": 1.0})
    before = evaluator.evaluate(candidate, "search").values["cross_entropy"]
    assert result.loss == pytest.approx(before, rel=1e-9)
    weight = model.classifier.weight
    step = 1e-5
    with torch.no_grad():
        weight[0, 0] += step
    fresh = candidate_at([0.0], model)
    after = evaluator.evaluate(fresh, "search").values["cross_entropy"]
    assert (after - before) / step == pytest.approx(float(weight.grad[0, 0]), rel=1e-3)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30),
)
@settings(max_examples=40, deadline=None)
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    answers, labels = (torch.tensor(column)[:, None] for column in zip(*pairs, strict=True))
    counted = torch.ones_like(labels, dtype=torch.bool)
    parts = [p.numpy() for p in f1_counts("f1", answers, labels, counted, 4).values()]
    expected = f1_score(labels[:, 0], answers[:, 0], average="macro", zero_division=0)
    assert macro_f1(parts) == pytest.approx(expected)


def test_correlations_of_constants_and_their_errors() -> None:
    rng = np.random.default_rng(0)
    one = rng.standard_normal(400)
    two = one + rng.standard_normal(400)
    assert spearman([np.ones(5), np.arange(5.0)]) == 0
    assert pearson([one, 2 * one + 1]) == pytest.approx(1)
    assert np.isnan(spearman([np.array([np.nan, 1.0]), np.arange(2.0)]))
    # For normal variables, the standard error of Pearson's r is (1 - r²) / √n.
    r = pearson([one, two])
    assert jackknife_error(pearson, [one, two]) == pytest.approx((1 - r**2) / 20, rel=0.5)


class TestRefused:
    def test_metrics_of_the_other_kind(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="expected metrics among accuracy, f1"):
            parse_evaluators([section(folder, "text_classification", "spearman")])
        with pytest.raises(ValueError, match="with a column of numbers, received f1"):
            parse_evaluators([section(folder, "text_classification", "f1", number="score")])

    def test_a_model_with_too_few_classes(self, folder: Path) -> None:
        evaluator = opened(section(folder, "text_classification", "accuracy"))
        with pytest.raises(InputError, match=r"0 to 1, as the model has 2 classes, received 2"):
            evaluator.evaluate(
                candidate_at([0.0], pico_bert("sequence", num_labels=CLASSES - 1)), "search"
            )

    def test_words_without_tags(self, folder: Path, tmp_path: Path) -> None:
        lines = (folder / "texts.jsonl").read_text().replace('"tags": [0, ', '"tags": [')
        (tmp_path / "texts.jsonl").write_text(lines)
        data = str(tmp_path / "texts.jsonl")
        evaluator = build(section(folder, "token_classification", "f1", data=data))
        for act in (evaluator.check, evaluator.open):
            with pytest.raises(InputError, match="expected a tag for every word, received"):
                act()

    def test_no_tokenizer(self, folder: Path) -> None:
        for kind in ("text_classification", "token_classification"):
            with pytest.raises(
                InputError, match=r"evaluators.0.tokenizer: required key is missing"
            ):
                build(section(folder, kind, "f1", tokenizer=None)).check()
