"""The checkpoints that every tool merges: a Llama-shaped base and three experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

EXPERTS = ("one", "two", "three")

_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

#: Size -> the rest of the configuration: 124M parameters in 111 tensors, 0.5B in 165.
SIZES: Mapping[str, Mapping[str, int]] = {
    "124M": {
        "vocab_size": 16000,
        "hidden_size": 768,
        "intermediate_size": 2560,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "0.5B": {
        "vocab_size": 32000,
        "hidden_size": 1280,
        "intermediate_size": 4352,
        "num_hidden_layers": 18,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
    },
}


def tensor_shapes(size: str = "124M") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model."""
    config = SIZES[size]
    hidden = config["hidden_size"]
    inner = config["intermediate_size"]
    vocabulary = config["vocab_size"]
    block = {
        **{f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"},
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        **{
            f"model.layers.{i}.{n}": s
            for i in range(config["num_hidden_layers"])
            for n, s in block.items()
        },
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


def parameters(size: str = "124M") -> int:
    """Number of parameters of a model."""
    return sum(int(np.prod(shape)) for shape in tensor_shapes(size).values())


def write_models(folder: Path, dtype: str, size: str = "124M") -> None:
    """The base and its experts, task vectors a twentieth of the weights; nothing where they are."""
    for index, name in enumerate(("base", *EXPERTS)):
        if not (folder / name / "model.safetensors").exists():
            _write_model(folder / name, dtype, size, index)


def _write_model(folder: Path, dtype: str, size: str, index: int) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**_LLAMA, **SIZES[size], "dtype": dtype}))
    base = np.random.default_rng(0)
    own = np.random.default_rng(index)
    state = {}
    for key, shape in tensor_shapes(size).items():
        values = 0.02 * base.standard_normal(shape, dtype=np.float32)
        if index:
            values += 0.001 * own.standard_normal(shape, dtype=np.float32)
        state[key] = torch.from_numpy(values).to(getattr(torch, dtype))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
