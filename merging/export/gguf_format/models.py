"""What GGUF says of each kind of model: its architecture, hyperparameters and changed tensors.

Facts as llama.cpp reads them: names of tensors come from the tables of the ``gguf`` package, and
the tensors that are stored in another way than transformers stores them are those of its converter
(llama.cpp, convert_hf_to_gguf.py): the rows of queries and keys of Llama in another order, the
matrices of GPT-2 turned, and 1 added to the norms of Gemma.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import InputError

Config = Mapping[str, Any]
Array = npt.NDArray[Any]
#: (stored name, tensor, configuration) -> the tensor as GGUF has it.
Change = Callable[[str, Array, Config], Array]


@dataclass(frozen=True)
class GgufModel:
    """A kind of model.

    Attributes:
        architecture: Name in GGUF.
        change: What is done to tensors.
        fields: Key after the name of the architecture -> key of the configuration.
        pre: How llama.cpp splits texts before byte-level BPE.
    """

    architecture: str
    change: Change
    fields: Mapping[str, str]
    pre: str = "default"


def _same(_name: str, tensor: Array, _config: Config) -> Array:
    return tensor


def _llama(name: str, tensor: Array, config: Config) -> Array:
    """Rows of queries and keys: each head's halves interleaved, as its rotations pair them."""
    match = re.search(r"\.(q|k)_proj\.(weight|bias)$", name)
    if match is None:
        return tensor
    heads = config["num_attention_heads"]
    if match[1] == "k":
        heads = config.get("num_key_value_heads") or heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _gpt2(name: str, tensor: Array, _config: Config) -> Array:
    turned = re.search(r"\.c_(attn|proj|fc)\.weight$", name) is not None
    return np.ascontiguousarray(tensor.T) if turned else tensor


def _gemma(name: str, tensor: Array, _config: Config) -> Array:
    return tensor + np.float32(1) if name.endswith("norm.weight") else tensor


_COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_HEAD_SIZE = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
_GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_PHI = {k: v for k, v in _COMMON.items() if "rms" not in k}
_PHI |= {"attention.layer_norm_epsilon": "layer_norm_eps"}
_GEMMA2 = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}

#: ``model_type`` of a configuration -> what GGUF says of it.
MODELS: Mapping[str, GgufModel] = {
    "llama": GgufModel("llama", _llama, _COMMON | _HEAD_SIZE, "llama-bpe"),
    "mistral": GgufModel("llama", _llama, _COMMON | _HEAD_SIZE, "tekken"),
    "qwen2": GgufModel("qwen2", _same, _COMMON, "qwen2"),
    "qwen3": GgufModel("qwen3", _same, _COMMON | _HEAD_SIZE, "qwen2"),
    "gpt2": GgufModel("gpt2", _gpt2, _GPT2, "gpt-2"),
    "phi": GgufModel("phi2", _same, _PHI, "gpt-2"),
    "phi3": GgufModel("phi3", _same, _COMMON),
    "gemma": GgufModel("gemma", _gemma, _COMMON | _HEAD_SIZE),
    "gemma2": GgufModel("gemma2", _gemma, _COMMON | _HEAD_SIZE | _GEMMA2),
}


def model_of(config: Config) -> GgufModel:
    """What GGUF says of a model.

    Raises:
        InputError: If it is no causal language model of :data:`MODELS`, or it turns positions or
            scales attention in a way that is not known here.
    """
    kind = str(config.get("model_type"))
    architecture = str((config.get("architectures") or [""])[0])
    if kind not in MODELS or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise InputError(
            f"gguf: expected a causal language model of one of the types {', '.join(MODELS)}, "
            f"received {architecture or 'no architecture'} of type {kind!r}; convert the folder of "
            "--out with llama.cpp's converter"
        )
    rope = rope_kind(config)
    if rope not in ("default", "linear", "llama3"):
        raise InputError(
            f"gguf: expected rotary positions that are default, linear or llama3, received "
            f"{rope!r}; convert the folder of --out with llama.cpp's converter"
        )
    _check_scale(config)
    return MODELS[kind]


def _check_scale(config: Config) -> None:
    """Refuse a scale of attention that llama.cpp does not take.

    It is that of the size of a head, and for Gemma 2 of 46 blocks that of the width by heads.

    Raises:
        InputError: In one line.
    """
    scale = config.get("query_pre_attn_scalar")
    if scale is None:
        return
    known = config.get("head_dim")
    if config["num_hidden_layers"] == 46:
        known = config["hidden_size"] // config["num_attention_heads"]
    if scale != known:
        raise InputError(
            f"gguf: expected query_pre_attn_scalar {known}, received {scale}, which GGUF cannot "
            "state for this model; load the folder of --out with transformers"
        )


def hyperparameters(config: Config) -> dict[str, int | float]:
    """Key after the name of the architecture -> value, as a model's GGUF states them."""
    model = model_of(config)
    found = {key: config.get(own) for key, own in model.fields.items()}
    if config["model_type"] == "gpt2":
        found["feed_forward_length"] = config.get("n_inner") or 4 * config["n_embd"]
    else:
        found["attention.head_count_kv"] = (
            config.get("num_key_value_heads") or config["num_attention_heads"]
        )
        found |= _rope(config)
    return {key: value for key, value in found.items() if value is not None}


def rope_kind(config: Config) -> str:
    """How positions are scaled: ``default``, ``linear``, ``llama3``, or what is not known here."""
    rope = _rope_settings(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_settings(config: Config) -> Config:
    settings: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return settings


def _rope(config: Config) -> dict[str, int | float | None]:
    rope = _rope_settings(config)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    found: dict[str, int | float | None] = {
        "rope.dimension_count": int(size * share),
        "rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
    }
    if rope_kind(config) == "linear":
        found["rope.scaling.factor"] = float(rope["factor"])
    return found


def rope_factors(config: Config) -> Array | None:
    """Divisors of the frequencies of Llama 3.1 and later ``(head_dim / 2,)``; None for others.

    As transformers' ``llama3`` scaling: low frequencies are divided by ``factor``, high ones stay,
    and those between are blended.
    """
    if rope_kind(config) != "llama3":
        return None
    rope = _rope_settings(config)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    turns = base ** (-np.arange(0, size, 2, dtype=np.float64) / size) / (2 * np.pi)
    turns *= rope["original_max_position_embeddings"]  # over the context of the training
    low = rope["low_freq_factor"]
    smooth = np.clip((turns - low) / (rope["high_freq_factor"] - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / rope["factor"] + smooth), np.float32)
