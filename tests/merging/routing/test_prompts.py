"""Input-dependent merges of language models: prompts decide, alone, and once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import InputError
from mergesearch.merging.models.task_heads import OwnHead
from mergesearch.merging.routing import divergence
from mergesearch.merging.routing.prompts import prompts_alone
from mergesearch.merging.routing.router import train_router
from mergesearch.merging.routing.t3 import T3
from mergesearch.merging.routing.twin_merging import TwinMerging
from mergesearch.merging.routing.vectors import copied_tensors, exclusive_vector, floating_tensors
from tests.evaluators.items import TOKENS, pico_llama

PROMPTS = ([3, 4, 5, 6, 7], [8, 9], [10, 11, 12])
ANSWERS = ([13], [14, 15, 16], [17, 18])
LOW, HIGH, GAMMA = 0.1, 0.8, 3.0


def t3(**options: Any) -> T3:
    values = {"low": LOW, "high": HIGH, "gamma": GAMMA} | options
    sources = [copied_tensors(pico_llama(seed)) for seed in (0, 1)]
    return T3(pico_llama(0), *sources, **values)


def twin(**options: Any) -> TwinMerging:
    models = [copied_tensors(pico_llama(seed)) for seed in (0, 1, 2)]
    vectors = [exclusive_vector(expert, models[0], 1.0) for expert in models[1:]]
    points = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    router = train_router(points, torch.arange(12) % 2, 2, width=8, steps=20, seed=0)
    return TwinMerging(pico_llama(0), models[0], vectors, router, **{"temperature": 1.0, **options})


def padded(rows: Sequence[Sequence[int]], side: str = "right") -> dict[str, torch.Tensor]:
    """Ids and mask; padding is a token that prompts have too."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 3)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def interpolated(weight: float) -> Any:
    """The model that T3 merges, by itself."""
    model = pico_llama(5)
    sources = [copied_tensors(pico_llama(seed)) for seed in (0, 1)]
    for name, target in floating_tensors(model).items():
        target.copy_(torch.lerp(*(source[name] for source in sources), weight))
    return model


def textbook_weight(prompt: Sequence[int]) -> float:
    """λ of one prompt, from the probabilities of the next token after each of its tokens."""
    with torch.no_grad():
        p, q = (
            pico_llama(seed)(input_ids=torch.tensor([list(prompt)])).logits[0].softmax(-1).double()
            for seed in (0, 1)
        )
    mean = (p + q) / 2
    apart = ((p * (p / mean).log()).sum(1) + (q * (q / mean).log()).sum(1)) / 2
    return LOW + (HIGH - LOW) / (1 + math.exp(-GAMMA * float(apart.mean())))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_of_prompts_decides_nothing(side: str) -> None:
    expected = [textbook_weight(prompt) for prompt in PROMPTS]
    assert len({round(one, 4) for one in expected}) == len(PROMPTS)
    weights = t3().weights_for(padded(PROMPTS, side))
    np.testing.assert_allclose(weights.flatten().tolist(), expected, atol=1e-6)


def test_answers_decide_nothing() -> None:
    whole = padded([p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    mask = torch.zeros_like(whole["input_ids"])
    for index, prompt in enumerate(PROMPTS):
        mask[index, : len(prompt)] = 1
    for routed in (t3(), twin()):
        answer = routed(**whole, prompt_mask=mask)
        assert torch.equal(answer.weights, routed.weights_for(padded(PROMPTS)))
        assert not torch.allclose(answer.weights, routed.weights_for(whole), atol=1e-4)


def test_what_goes_with_prompts_decides_with_them() -> None:
    images = torch.rand(2, 3, 4, 4)
    ids = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])
    found = prompts_alone(
        {
            "input_ids": ids,
            "prompt_mask": torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]),
            "token_type_ids": 10 * ids,
            "pixel_values": images,
        }
    )
    assert found["input_ids"].tolist() == [[5, 6], [8, 0]]
    assert found["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert found["token_type_ids"][0].tolist() == [50, 60]
    assert torch.equal(found["pixel_values"], images)
    assert "prompt_mask" not in found


def test_each_text_is_scored_by_the_model_of_its_prompt() -> None:
    whole = padded([p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    mask = whole["attention_mask"].clone()
    for index, (prompt, own) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        mask[index, len(prompt) : len(prompt) + len(own)] = 0
    answer = t3()(**whole, prompt_mask=mask)
    for index, (prompt, own) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        with torch.no_grad():
            alone = interpolated(textbook_weight(prompt))(input_ids=torch.tensor([prompt + own]))
        count = len(prompt) + len(own)
        torch.testing.assert_close(answer.logits[index, :count], alone.logits[0], atol=1e-4, rtol=0)


def test_logits_of_prompts_are_kept_for_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = t3().weights_for(padded(PROMPTS))
    monkeypatch.setattr(divergence, "KEPT_LOGITS", 2 * 5 * TOKENS * 4)  # one prompt
    monkeypatch.setattr(divergence, "AT_ONCE", 2 * TOKENS)
    inputs = prompts_alone(padded(PROMPTS))
    widths = [part["input_ids"].shape for part in divergence.split_prompts(pico_llama(0), inputs)]
    assert widths == [(1, 5), (1, 2), (1, 3)]
    torch.testing.assert_close(t3().weights_for(padded(PROMPTS)), whole, atol=1e-6, rtol=0)


def test_a_router_sees_the_mean_state_of_the_prompt() -> None:
    model = pico_llama(0)
    with torch.no_grad():
        features = OwnHead().features(model, padded(PROMPTS))
        for row, prompt in zip(features, PROMPTS, strict=True):
            alone = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
            torch.testing.assert_close(row, alone.hidden_states[-1][0].mean(0), atol=1e-5, rtol=0)


def test_what_is_written_is_by_the_model_of_the_prompt() -> None:
    routed = t3()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    eos = int(routed.generate(**padded([PROMPTS[1]], "left"), **options)[0, 3])
    options["eos_token_id"] = eos  # so that one text ends before the others
    written = routed.generate(**padded(PROMPTS, "left"), **options)
    width = max(map(len, PROMPTS))
    ends = set()
    for row, prompt in zip(written, PROMPTS, strict=True):
        ids = torch.tensor([prompt])
        model = interpolated(textbook_weight(prompt))
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        own = alone[0, len(prompt) :].tolist()
        ends.add(len(own))
        assert row[width:].tolist() == own + [0] * (written.shape[1] - width - len(own))
    assert len(ends) > 1


def test_a_batch_of_prompts_is_merged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = t3(per="batch")
    rows: list[Sequence[float]] = []
    write = T3.write
    monkeypatch.setattr(T3, "write", lambda self, row: (rows.append(row), write(self, row))[1])
    routed.generate(**padded(PROMPTS, "left"), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert len(rows) == 1
    assert len(routed(**padded(PROMPTS)).weights.unique()) == 1


def test_prompts_are_refused_that_do_not_fit() -> None:
    batch = padded(PROMPTS)
    with pytest.raises(InputError, match=r"prompt_mask: expected the shape of input_ids, \(3, 5\)"):
        t3()(**batch, prompt_mask=torch.ones(3, 4))
    empty = torch.tensor([[1] * 5, [0] * 5, [1] * 5])
    with pytest.raises(InputError, match=r"at least one token of a prompt for every item.*item 1"):
        t3()(**batch, prompt_mask=empty)
    with pytest.raises(InputError, match=r"num_return_sequences: expected none.*received 2"):
        t3().generate(**batch, num_return_sequences=2)
