"""Tiny transformers whose attention is fused, and the matrices that operators see in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mergesearch.merging.operators.parts.matrices import Selection, matrices_in
from mergesearch.merging.operators.parts.matrix_part import MatrixPart

State = dict[str, torch.Tensor]
_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {
    "vocab_size": 40,
    "n_embd": 24,
    "n_head": 6,
    "n_layer": 2,
    "n_positions": 16,
    **{f"{word}_token_id": place for place, word in enumerate(("pad", "bos", "eos"))},
}


@dataclass(frozen=True)
class Fused:
    """A tiny model whose attention is fused.

    Attributes:
        model: Class in transformers.
        config: Its configuration class.
        options: Arguments of the configuration.
        name: End of the name of the fused weight.
        output: End of the name of the output projection beside it.
        sides: What each matrix is, in order.
        split: Method of the attention class that divides the fused features, if it has one.
    """

    model: str
    config: str
    options: dict[str, Any]
    name: str = "query_key_value.weight"
    output: str = "dense.weight"
    sides: str = "qkv"
    split: str = ""

    def build(self) -> torch.nn.Module:
        """The model in float64, all biases zero."""
        import transformers

        config = getattr(transformers, self.config)(**self.options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: torch.nn.Module = getattr(transformers, self.model)(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(std=0.4)
                    elif name.endswith("bias"):
                        parameter.zero_()
        return model.double().eval()


MODELS: dict[str, Fused] = {
    "falcon grouped": Fused(
        "FalconForCausalLM",
        "FalconConfig",
        _SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2},
        split="_split_heads",
    ),
    "falcon multi-query": Fused(
        "FalconForCausalLM", "FalconConfig", _SIZES | {"multi_query": True}, split="_split_heads"
    ),
    "falcon by head": Fused(
        "FalconForCausalLM", "FalconConfig", _SIZES | {"multi_query": False}, split="_split_heads"
    ),
    "gpt_neox": Fused("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    "gpt_neox_japanese": Fused(
        "GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", _SIZES | {"rotary_pct": 0.5}
    ),
    "bloom": Fused(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 40, "hidden_size": 24, "n_layer": 2, "n_head": 6},
        split="_reshape",
    ),
    "persimmon": Fused(
        "PersimmonForCausalLM",
        "PersimmonConfig",
        _SIZES | {"qk_layernorm": False},
        split="_split_heads",
    ),
    "gpt_bigcode multi-query": Fused(
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        _GPT | {"multi_query": True},
        "c_attn.weight",
        "c_proj.weight",
    ),
    "gpt_bigcode by head": Fused(
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        _GPT | {"multi_query": False},
        "c_attn.weight",
        "c_proj.weight",
    ),
    "codegen": Fused(
        "CodeGenForCausalLM",
        "CodeGenConfig",
        _GPT | {"n_embd": 32, "n_head": 8, "rotary_dim": 2},
        "qkv_proj.weight",
        "out_proj.weight",
        "qvk",
    ),
    "deberta": Fused(
        "DebertaForMaskedLM",
        "DebertaConfig",
        _SIZES | {"relative_attention": False},
        "self.in_proj.weight",
        "output.dense.weight",
    ),
    "deepseek_v3": Fused(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SIZES
        | {
            "num_key_value_heads": 6,
            "first_k_dense_replace": 2,
            "q_lora_rank": None,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 10,
        },
        "kv_b_proj.weight",
        "o_proj.weight",
        ".v",
    ),
}


def divided(name: str, weight: torch.Tensor, config: Mapping[str, Any]) -> tuple[MatrixPart, ...]:
    """The matrices that operators see in a tensor."""
    shape = tuple(weight.shape)
    return matrices_in(name, shape, Selection.of({name: shape}, config=config))
