"""Losses of retrieval, speech and visual questions are those of their definitions, with gradients.

Every gradient is compared with a finite difference of the loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.evaluators import Batch, Evaluator
from mergesearch.evaluators.audio.text_losses import forced_losses, known_tokens
from mergesearch.evaluators.data.pictures import opened_picture
from mergesearch.evaluators.images.answer_losses import taught
from mergesearch.evaluators.images.questions import commonest
from mergesearch.merging import InputError
from tests.evaluators.answered import pico_llava, question_folder
from tests.evaluators.items import build, candidate_at, opened
from tests.evaluators.pairs import (
    pair_folder,
    pair_rows,
    pico_encoder,
    pico_t5,
    pico_wav2vec,
    pico_whisper,
    spoken_rows,
)

LOSS = "cross_entropy"
#: Of finite differences.
STEP = 1e-4
PAIRS = {row["id"]: row for row in pair_rows()}
SPOKEN = {row["id"]: row for row in spoken_rows()}

#: Chat templates with a mark at the end of a turn, and without.
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% for p in m.content %}{% if p.text %}{{ p.text }}"
    "{% else %}<image>{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NAMED = (
    "{% for m in messages %}{{ m.role | upper }}: {% for p in m.content %}{% if p.text %}"
    "{{ p.text }} {% else %}<image>\n{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pair_folder(tmp_path_factory.mktemp("losses"))
    (folder / "spoken.jsonl").write_text("\n".join(json.dumps(row) for row in SPOKEN.values()))
    return question_folder(folder)


def retrieval(folder: Path, **options: Any) -> dict[str, Any]:
    return section(folder, "retrieval", data=str(folder / "pairs.jsonl"), **options)


def alignment(folder: Path, **options: Any) -> dict[str, Any]:
    # Convolutions see the padding of shorter recordings.
    given = {"tokenizer": str(folder / "letters"), "batch_size": 1} | options
    return section(folder, "speech_recognition", **given)


def forced(folder: Path, **options: Any) -> dict[str, Any]:
    return section(
        folder,
        "speech_recognition",
        model_class="AutoModelForSpeechSeq2Seq",
        inputs={"input_features": "frames"},
        **options,
    )


def questions(folder: Path, **options: Any) -> dict[str, Any]:
    given = {"tokenizer": str(folder / "processor"), "answers": "people"} | options
    return section(folder, "visual_questions", data=str(folder / "questions.parquet"), **given)


def section(folder: Path, kind: str, **options: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "data": str(folder / "spoken.jsonl"),
        "id": "id",
        "tokenizer": str(folder / "tokenizer"),
        "objectives": [{"metric": LOSS}],
        "batch_size": 4,
        **options,
    }


CASES = {
    "retrieval": (retrieval, pico_encoder),
    "alignment": (alignment, lambda: pico_wav2vec("ctc")),
    "teacher forcing": (forced, pico_whisper),
    "questions": (questions, pico_llava),
}


def ids_of(evaluator: Evaluator) -> list[str]:
    ids: list[str] = evaluator._tables.load("search")["id"]  # type: ignore[attr-defined]
    return ids


def losses(evaluator: Evaluator, model: Any) -> Any:
    return evaluator.evaluate(candidate_at([0.0], model), "search").items[LOSS]


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_loss(folder: Path, case: str) -> None:
    make, maker = CASES[case]
    model = maker().double()
    # Without the loss as an objective, it is what strategies may follow all the same.
    metric = {"retrieval": "ndcg", "questions": "accuracy"}.get(case, "cer")
    proxied = opened(make(folder, objectives=[{"metric": metric}]))
    evaluator = opened(make(folder))
    assert evaluator.differentiable == proxied.proxies == (LOSS,)
    candidate = candidate_at([0.0], model)
    result = evaluator.backward(candidate, Batch(), {LOSS: 1.0})
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before = float(losses(evaluator, model).mean())
    assert result.loss == pytest.approx(before, rel=1e-9)
    model.zero_grad()
    assert proxied.backward(candidate, Batch(), {LOSS: 1.0}).loss == pytest.approx(before, rel=1e-6)
    name, slope = max(found.items(), key=lambda pair: float(pair[1].abs().max()))
    at = int(slope.abs().argmax())
    weight = dict(model.named_parameters())[name].data.view(-1)
    values = []
    for sign in (1, -1):
        weight[at] += sign * STEP
        values.append(float(losses(evaluator, model).mean()))
        weight[at] -= sign * STEP
    rate = (values[0] - values[1]) / (2 * STEP)
    # Llama normalises in fp32 whatever its dtype.
    assert rate == pytest.approx(float(slope.view(-1)[at]), rel=1e-3)


def embedding(model: Any, folder: Path, text: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder / "tokenizer")(text, return_tensors="pt")
    with torch.no_grad():
        state = model(input_ids=ids["input_ids"]).last_hidden_state[0].mean(dim=0)
    return state / state.norm()


class TestRetrieval:
    def test_it_is_info_nce(self, folder: Path) -> None:
        """With a pool of all documents, the right one competes with all of its domain."""
        model = pico_encoder().double()
        evaluator = opened(retrieval(folder, domain="domain", temperature=0.5))
        rows = [PAIRS[one] for one in ids_of(evaluator)]
        queries, documents = (
            torch.stack([embedding(model, folder, row[key]) for row in rows])
            for key in ("query", "document")
        )
        cosines = queries @ documents.T / 0.5
        for index, (row, loss) in enumerate(zip(rows, losses(evaluator, model), strict=True)):
            among = [n for n, other in enumerate(rows) if other["domain"] == row["domain"]]
            expected = cosines[index, among].logsumexp(0) - cosines[index, index]
            assert loss == pytest.approx(float(expected), rel=1e-6)

    def test_the_pool_is_the_same_for_all_queries_and_orders(self, folder: Path) -> None:
        evaluator = opened(retrieval(folder, domain="domain", candidates=3))
        items = evaluator._items["search"]  # type: ignore[attr-defined]
        chosen = items.documents.domains[items.pool]
        assert sorted(chosen) == ["day"] * 3 + ["night"] * 3
        some = items.rows(np.flatnonzero(items.domains == "day")[:2])
        few = some.compared()
        assert len(few.documents.domains) <= 3 + 2
        for old, new in zip(some.right, few.right, strict=True):
            one, two = (
                of.documents.inputs["input_ids"][at] for of, at in ((some, old), (few, new))
            )
            assert torch.equal(one, two)

    def test_neither_shares_nor_the_size_of_batches_change_it(self, folder: Path) -> None:
        model = pico_encoder().double()
        candidate = candidate_at([0.0], model)
        slopes = []
        for size, shares in ((4, 1), (30, 1), (4, 3)):
            model.zero_grad()
            evaluator = opened(retrieval(folder, batch_size=size, candidates=5))
            for share in range(shares):
                evaluator.backward(candidate, Batch(share=share, shares=shares), {LOSS: 1 / shares})
            slopes.append(model.embeddings.word_embeddings.weight.grad.clone())
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(slopes[2], slopes[0], rtol=1e-8, atol=1e-11)


class TestSpeech:
    def test_alignments_are_scored_as_transformers_does(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        model = pico_wav2vec("ctc").double()
        evaluator = opened(alignment(folder, batch_size=1))
        tokenizer = AutoTokenizer.from_pretrained(folder / "letters")
        for one, loss in zip(ids_of(evaluator), losses(evaluator, model), strict=True):
            labels = tokenizer(SPOKEN[one]["text"], return_tensors="pt")["input_ids"]
            audio = torch.tensor(SPOKEN[one]["audio"], dtype=torch.float32).double()
            with torch.no_grad():
                expected = float(model(audio[None], labels=labels).loss)  # a sum
            assert loss == pytest.approx(expected / labels.shape[1], rel=1e-5)

    def test_a_batch_does_not_hear_its_padding(self, folder: Path) -> None:
        from torch.nn.utils.rnn import pad_sequence

        model = pico_wav2vec("ctc").double()
        evaluator = opened(alignment(folder, batch_size=30))
        items = evaluator._items["search"]  # type: ignore[attr-defined]
        audio = [row.double() for row in items.inputs["input_values"]]
        labels = items.extra["labels"]
        masks = [torch.ones(len(row), dtype=torch.int64) for row in audio]
        with torch.no_grad():
            expected = model(
                pad_sequence(audio, batch_first=True),
                attention_mask=pad_sequence(masks, batch_first=True),
                labels=pad_sequence(labels, batch_first=True, padding_value=-100),
            ).loss
        counts = [len(row) for row in labels]
        assert losses(evaluator, model) @ counts == pytest.approx(float(expected), rel=1e-6)

    def test_teacher_forcing_is_the_loss_of_transformers(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        model = pico_whisper().double()
        evaluator = opened(forced(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        for one, loss in zip(ids_of(evaluator), losses(evaluator, model), strict=True):
            labels = tokenizer(SPOKEN[one]["text"], return_tensors="pt")["input_ids"]
            frames = torch.tensor(SPOKEN[one]["frames"], dtype=torch.float32).double()
            with torch.no_grad():
                expected = float(model(frames[None], labels=labels).loss)
            assert loss == pytest.approx(expected, rel=1e-5)

    def test_the_token_that_starts_the_decoder_is_no_part_of_the_text(self, folder: Path) -> None:
        model = pico_whisper().double()
        items = opened(forced(folder))._items["search"].rows(slice(0, 2))  # type: ignore[attr-defined]
        text = torch.tensor([5, 6, 2])
        start = torch.tensor([model.config.decoder_start_token_id])
        plain = forced_losses(model, items, [text, text])
        assert torch.equal(forced_losses(model, items, [torch.cat([start, text])] * 2), plain)

    def test_letters_are_spelt_as_the_tokenizer_knows_them(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / "letters")
        plain = known_tokens(tokenizer, "ab", ignore_case=False)
        assert torch.equal(known_tokens(tokenizer, "A!B?", ignore_case=True), plain)
        assert not len(known_tokens(tokenizer, "A!B?", ignore_case=False))

    def test_texts_that_do_not_fit_are_refused_where_the_loss_is_measured(
        self, folder: Path
    ) -> None:
        model = pico_wav2vec("ctc").double()
        short = alignment(folder, data=str(folder / "pairs.jsonl"), max_items=3)
        with pytest.raises(InputError, match=r"texts that fit their recordings, received \d+ tok"):
            losses(opened(short), model)
        proxied = opened(short | {"objectives": [{"metric": "cer"}]})
        result = proxied.backward(candidate_at([0.0], model), Batch(), {LOSS: 1.0})
        assert result.loss == 0
        assert all(
            bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None
        )

    def test_unknown_letters_and_tokens_are_refused(self, folder: Path, tmp_path: Path) -> None:
        rows = [row | {"text": "ÄÖ"} for row in SPOKEN.values()]
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        with pytest.raises(InputError, match="in letters that the tokenizer knows, received 'ÄÖ'"):
            opened(alignment(folder, data=str(tmp_path / "rows.jsonl")))
        other = opened(alignment(folder, tokenizer=str(folder / "tokenizer")))
        with pytest.raises(InputError, match="expected token numbers below 39, as the model has"):
            losses(other, pico_wav2vec("ctc"))


class TestQuestions:
    def test_the_answer_alone_is_scored(self, folder: Path) -> None:
        from transformers import AutoProcessor

        model = pico_llava().double()
        evaluator = opened(questions(folder, instruction="say", batch_size=5))
        items = evaluator._items["search"]  # type: ignore[attr-defined]
        processor = AutoProcessor.from_pretrained(folder / "processor")
        answer = processor.tokenizer("red<eos>")["input_ids"]
        for index, loss in enumerate(losses(evaluator, model)):
            batch = processor(
                text=[f"<image>{items.questions[index]} sayred<eos>"],
                images=[opened_picture(items.pictures[index])],
                return_tensors="pt",
            )
            assert batch["input_ids"][0, -len(answer) :].tolist() == answer
            batch["pixel_values"] = batch["pixel_values"].double()
            with torch.no_grad():
                log_p = model(**batch).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
            expected = -log_p.gather(1, torch.tensor(answer)[:, None]).mean()
            assert loss == pytest.approx(float(expected), rel=1e-6)

    def test_encoder_decoders_are_taught_by_their_decoder(self, folder: Path) -> None:
        class Blind(torch.nn.Module):
            """A T5 that is called as if it saw pictures."""

            def __init__(self) -> None:
                super().__init__()
                self.inner = pico_t5().double()
                self.config = self.inner.config

            def forward(self, pixel_values: torch.Tensor, **inputs: Any) -> Any:
                return self.inner(**inputs)

        model = Blind()
        model.inner.resize_token_embeddings(301, mean_resizing=False)
        evaluator = opened(questions(folder, answers=None, answer="answer"))
        items = evaluator._items["search"]  # type: ignore[attr-defined]
        tokenizer = evaluator._processor.tokenizer  # type: ignore[attr-defined]
        labels = tokenizer("red", return_tensors="pt")["input_ids"]
        ids = tokenizer("<image>" * 4 + items.questions[0], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = float(model.inner(input_ids=ids, labels=labels).loss)
        assert losses(evaluator, model)[0] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize(("template", "end"), [(MARKED, "<|end|>"), (NAMED, "<eos>")])
    def test_templates_of_turns(self, folder: Path, template: str, end: str) -> None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(folder / "processor")
        processor.chat_template = template
        text, count = taught(processor, "which red?", "the cat", "evaluators.0")
        assert text.count("which red?") == 1
        last = processor.tokenizer(text)["input_ids"][-count:]
        assert processor.tokenizer.decode(last).strip() == f"the cat{end}"

    def test_most_people_are_right(self) -> None:
        assert commonest(["blue", "Red.", "the red"]) == "Red."
        assert commonest(["blue", "red"]) == "blue"

    def test_a_template_without_answers(self, folder: Path, tmp_path: Path) -> None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(folder / "processor")
        processor.chat_template = "<image>{{ messages[0].content[1].text }}"
        processor.save_pretrained(tmp_path)
        silent = questions(folder, tokenizer=str(tmp_path))
        with pytest.raises(InputError, match="a chat template with assistant's turns, which cross"):
            build(silent).check()
        plain = build(silent | {"objectives": [{"metric": "accuracy"}]})
        plain.check()
        assert plain.proxies == ()
