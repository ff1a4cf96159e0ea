"""Evaluators of pairs of texts and of audio agree with plain loops over single items."""

from __future__ import annotations

import logging
import logging.handlers
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from mergesearch.evaluators import Batch, Evaluator
from mergesearch.evaluators.metrics import libraries, written
from mergesearch.evaluators.metrics.written import WRITTEN
from mergesearch.evaluators.model_items import generated
from mergesearch.evaluators.spec.evaluators import parse_evaluators
from mergesearch.merging import InputError
from tests.evaluators.classified import pico_bert
from tests.evaluators.items import build, candidate_at, opened
from tests.evaluators.language import text_llama
from tests.evaluators.pairs import (
    letter_tokenizer,
    pair_folder,
    pair_rows,
    pico_encoder,
    pico_t5,
    pico_wav2vec,
)

ROWS = {row["id"]: row for row in pair_rows()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_folder(tmp_path_factory.mktemp("pairs"))


def section(folder: Path, kind: str, *metrics: str, **options: Any) -> dict[str, Any]:
    tokens = {} if kind == "audio_classification" else {"tokenizer": str(folder / "tokenizer")}
    return {
        "kind": kind,
        "data": str(folder / "pairs.jsonl"),
        "id": "id",
        "batch_size": 4,
        "objectives": [{"metric": metric} for metric in metrics],
        **tokens,
        **options,
    }


def search_rows(evaluator: Evaluator) -> list[dict[str, Any]]:
    """The rows of the search items, in their order."""
    ids = evaluator._tables.load("search")["id"]  # type: ignore[attr-defined]
    return [ROWS[one] for one in ids]


def ids_of(folder: Path, text: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    found: torch.Tensor = AutoTokenizer.from_pretrained(folder / "tokenizer")(
        text, return_tensors="pt"
    )["input_ids"]
    return found


def test_rewards(folder: Path) -> None:
    model = pico_bert("sequence", num_labels=1).double()
    evaluator = opened(section(folder, "reward", "accuracy", "cross_entropy"))
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    for index, row in enumerate(search_rows(evaluator)):
        with torch.no_grad():
            one, two = (
                float(model(input_ids=ids_of(folder, row[key])).logits)
                for key in ("chosen", "rejected")
            )
        assert measured.items["accuracy"][index] == (one > two)
        expected = np.log1p(np.exp(two - one))
        assert measured.items["cross_entropy"][index] == pytest.approx(expected, rel=1e-6)
    loss = evaluator.backward(candidate_at([0.0], model), Batch(), {"cross_entropy": 1.0}).loss
    assert loss == pytest.approx(measured.values["cross_entropy"])
    with pytest.raises(InputError, match="use kind: text_classification"):
        evaluator.evaluate(candidate_at([0.0], pico_bert("sequence")), "search")


def test_a_length_of_the_models_own_is_not_warned_of() -> None:
    """Whisper has one; transformers would warn in every batch."""
    model = text_llama()
    model.generation_config.max_length = 20
    said = logging.handlers.BufferingHandler(99)
    logger = logging.getLogger("transformers.generation.utils")
    logger.addHandler(said)
    try:
        rows = generated(model, {"input_ids": torch.tensor([[5, 6]])}, 2)
    finally:
        logger.removeHandler(said)
    assert rows.shape == (1, 4)
    assert not said.buffer


def test_what_an_encoder_decoder_writes(folder: Path) -> None:
    from transformers import AutoTokenizer

    model = pico_t5().double()
    metrics = ("chrf", "rouge_l", "exact_match", "cross_entropy")
    evaluator = opened(section(folder, "sequence_to_sequence", *metrics, max_new_tokens=6))
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for index, row in enumerate(search_rows(evaluator)):
        ids = ids_of(folder, row["text"])
        with torch.no_grad():
            written = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
            loss = model(input_ids=ids, labels=ids_of(folder, row["target"])).loss
        text = tokenizer.decode(written[0], skip_special_tokens=True)
        for metric in metrics[:3]:
            assert measured.items[metric][index] == WRITTEN[metric][0](text, row["target"])
        assert measured.items["cross_entropy"][index] == pytest.approx(float(loss), rel=1e-5)
    assert measured.values["chrf"] > 0
    loss = evaluator.backward(candidate_at([0.0], model), Batch(), {"cross_entropy": 1.0}).loss
    assert loss == pytest.approx(measured.values["cross_entropy"])


def embedding(model: Any, folder: Path, text: str) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        state = model(input_ids=ids_of(folder, text)).last_hidden_state[0].mean(dim=0).numpy()
    return np.asarray(state / np.linalg.norm(state))


def test_similarity(folder: Path) -> None:
    model = pico_encoder().double()
    evaluator = opened(section(folder, "similarity", "spearman", "squared_error", scale=[0, 5]))
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    rows = search_rows(evaluator)
    cosines = [
        embedding(model, folder, row["text"]) @ embedding(model, folder, row["pair"])
        for row in rows
    ]
    numbers = [row["score"] / 5 for row in rows]
    assert measured.values["spearman"] == pytest.approx(spearmanr(cosines, numbers)[0])
    errors = (np.array(cosines) - numbers) ** 2
    np.testing.assert_allclose(measured.items["squared_error"], errors, rtol=1e-4)
    loss = evaluator.backward(candidate_at([0.0], model), Batch(), {"squared_error": 1.0}).loss
    assert loss == pytest.approx(measured.values["squared_error"])


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_retrieval(folder: Path, pooling: str) -> None:
    model = pico_encoder().double()
    evaluator = opened(section(folder, "retrieval", "recall", "ndcg", k=4, pooling=pooling))
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    assert 0 < measured.values["recall"] < 1
    if pooling != "mean":
        return
    rows = search_rows(evaluator)
    documents = np.array([embedding(model, folder, row["document"]) for row in rows])
    for index, row in enumerate(rows):
        scores = documents @ embedding(model, folder, row["query"])
        rank = int((scores >= scores[index]).sum())
        assert measured.items["recall"][index] == (rank <= 4)
        gain = 1 / np.log2(rank + 1) if rank <= 4 else 0
        assert measured.items["ndcg"][index] == pytest.approx(gain)


def test_classes_of_recordings(folder: Path) -> None:
    model = pico_wav2vec("classes").double()
    evaluator = opened(section(folder, "audio_classification", "accuracy", "cross_entropy", "f1"))
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    rows = search_rows(evaluator)
    assert len(measured.items["accuracy"]) == len(rows)
    for index, row in enumerate(rows):
        if len(row["audio"]) < max(len(one["audio"]) for one in rows):
            continue  # convolutions see the padding of shorter ones
        with torch.no_grad():
            logits = model(torch.tensor(row["audio"], dtype=torch.float32).double()[None]).logits[0]
        expected = -float(logits.log_softmax(0)[row["label"]])
        assert measured.items["cross_entropy"][index] == pytest.approx(expected, rel=1e-5)
    assert evaluator.differentiable == ("cross_entropy",)


def test_what_is_heard(folder: Path) -> None:
    model = pico_wav2vec("ctc")
    evaluator = opened(
        section(
            folder, "speech_recognition", "wer", "cer", tokenizer=str(folder / "letters"),
            batch_size=1,
        )
    )  # fmt: skip
    measured = evaluator.evaluate(candidate_at([0.0], model), "search")
    from nltk.metrics.distance import edit_distance
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "letters")
    for index, row in enumerate(search_rows(evaluator)):
        with torch.no_grad():
            logits = model(torch.tensor(row["audio"])[None]).logits
        text = tokenizer.batch_decode(logits.argmax(-1))[0].lower()
        words = row["text"].split()
        assert measured.items["wer"][index] == edit_distance(text.split(), words) / len(words)
        characters = edit_distance(text.strip(), row["text"]) / len(row["text"])
        assert measured.items["cer"][index] == characters
    assert 0 < measured.values["cer"] < 2


class TestScores:
    def test_known_values(self) -> None:
        assert WRITTEN["wer"][0]("a b d", "a b c e") == 2 / 4
        assert WRITTEN["cer"][0]("abd", "abc") == 1 / 3
        assert WRITTEN["chrf"][0]("the cat", "the cat") == 1
        assert WRITTEN["rouge_l"][0]("the cat sat", "the cat ran") == pytest.approx(2 / 3)
        assert WRITTEN["exact_match"][0](" a ", "a") == 1

    def test_rapidfuzz_counts_as_nltk_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("rapidfuzz")
        rng = np.random.default_rng(4)
        texts = [" ".join(rng.choice(["a", "bc", "é", "d\t"], 6)) for _ in range(40)]
        scores = []
        for there in (True, False):
            monkeypatch.setattr(written, "is_installed", lambda name, there=there: there)
            scores.append(
                [
                    WRITTEN[metric][0](one, two)
                    for metric in ("wer", "cer")
                    for one, two in pairwise(texts)
                ]
            )
        assert scores[0] == scores[1]
        assert len(set(scores[0])) > 5

    def test_a_missing_library_is_refused(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libraries, "find_spec", lambda name: None)
        sections = (
            section(folder, "sequence_to_sequence", "chrf"),
            section(folder, "speech_recognition", "wer"),
        )
        for one, name in zip(sections, ("sacrebleu", "nltk"), strict=True):
            with pytest.raises(InputError, match=f"expected the library {name}, which computes"):
                build(one).check()

    def test_a_scale_rises(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="two numbers that rise"):
            parse_evaluators([section(folder, "similarity", "spearman", scale=[1, 1])])

    def test_texts_are_required(self, folder: Path, tmp_path: Path) -> None:
        text = (folder / "pairs.jsonl").read_text().replace('"target": "', '"target": null, "t": "')
        (tmp_path / "pairs.jsonl").write_text(text)
        data = str(tmp_path / "pairs.jsonl")
        with pytest.raises(InputError, match="expected texts in column 'target', received null"):
            build(section(folder, "sequence_to_sequence", "chrf", data=data)).check()


def test_letters(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(tmp_path / "letters")
    assert tokenizer.decode([3, 3, 0, 3, 2, 4]) == "aa b"
