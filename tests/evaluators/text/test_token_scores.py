"""Log-probabilities in parts: the values of the whole, within a bound of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from mergesearch.evaluators.text import token_scores
from mergesearch.evaluators.text.token_scores import (
    CPU_HEAD_BYTES,
    TokenScores,
    Wanted,
    head_path,
    score_tokens,
)
from tests.evaluators.measuring import peak_bytes

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Model -> how its head is applied, and what makes it so.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("head", SIZES),
    "Qwen2": ("head", SIZES),
    "OPT": ("head", SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.5}),
    "Gemma2": ("forward", SIZES | {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "Cohere": ("forward", SIZES | {"logit_scale": 0.25}),
    "Granite": ("forward", SIZES | {"logits_scaling": 7.0}),
}


def causal(family: str, **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family][1] | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch(rows: int, width: int, vocabulary: int = 300) -> tuple[dict[str, Any], Wanted]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (rows, width), generator=generator)
    lines, columns = torch.ones(rows, width - 1).nonzero(as_tuple=True)
    return {"input_ids": ids, "use_cache": False}, Wanted(lines, columns, ids[lines, columns + 1])


@torch.inference_mode()
def scored(model: Any, arguments: dict[str, Any], wanted: Wanted) -> TokenScores:
    return score_tokens(model, arguments, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_have_the_scores_of_the_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal(family)
    arguments, wanted = batch(3, 9)
    with torch.inference_mode():
        chances = model(**arguments).logits.log_softmax(-1)[wanted.lines, wanted.columns]
    whole = scored(model, arguments, wanted)
    monkeypatch.setattr(token_scores, "CPU_HEAD_BYTES", 5 * 8 * 300)  # five positions at once
    parts = scored(model, arguments, wanted)
    assert head_path(model) == FAMILIES[family][0]
    for one in (whole, parts):
        expected = chances.gather(1, wanted.tokens[:, None])[:, 0]
        torch.testing.assert_close(one.log_p, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(one.likeliest, chances.argmax(-1) == wanted.tokens)


def test_a_model_without_a_head_of_its_own_is_run_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = causal("Llama")
    arguments, wanted = batch(2, 5)
    expected = scored(model, arguments, wanted)
    model.get_output_embeddings = lambda: None
    monkeypatch.setattr(token_scores, "CPU_HEAD_BYTES", 1)
    torch.testing.assert_close(scored(model, arguments, wanted).log_p, expected.log_p)
    assert head_path(model) == "whole"


@pytest.mark.parametrize("vocabulary", [128_256, 256_000])
def test_memory_is_bounded_for_large_vocabularies(vocabulary: int) -> None:
    model = causal("Llama", vocab_size=vocabulary, hidden_size=8).to(torch.bfloat16)
    arguments, wanted = batch(2, 50, vocabulary)
    assert head_path(model) == "head"
    whole = len(wanted.tokens) * vocabulary * 8
    assert whole > 1.4 * CPU_HEAD_BYTES
    # Beside logits: activations, and one row of logits that the model itself computes.
    assert peak_bytes(lambda: scored(model, arguments, wanted)) < CPU_HEAD_BYTES + 4 * 2**20
