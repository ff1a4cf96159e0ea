"""Checkpoints of real shapes as sparse files: the headers are real, the weights are holes."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
#: Sizes of Llama 3 8B: 8,030,261,248 parameters.
LLAMA_8B: dict[str, Any] = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
#: Sizes of Llama 3 70B: 70,553,706,496 parameters.
LLAMA_70B: dict[str, Any] = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
#: Sizes of Qwen 2.5 0.5B without its biases, tied: 493,990,784 parameters.
QWEN_HALF_B: dict[str, Any] = LLAMA | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}

Shapes = dict[str, tuple[int, ...]]


def llama_shapes(config: dict[str, Any]) -> Shapes:
    """Stored name -> shape of every tensor."""
    h = config["hidden_size"]
    m = config["intermediate_size"]
    keys = h * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], h),
        "model.norm.weight": (h,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], h)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (h, h)),
            ("self_attn.k_proj", (keys, h)),
            ("self_attn.v_proj", (keys, h)),
            ("self_attn.o_proj", (h, h)),
            ("mlp.gate_proj", (m, h)),
            ("mlp.up_proj", (m, h)),
            ("mlp.down_proj", (h, m)),
            ("input_layernorm", (h,)),
            ("post_attention_layernorm", (h,)),
        ):
            shapes[f"{prefix}{name}.weight"] = shape
    return shapes


def write_sparse(file: Path, shapes: Shapes, dtype: str = "BF16", itemsize: int = 2) -> None:
    """A safetensors file whose tensors are holes."""
    header = {}
    at = 0
    for name, shape in shapes.items():
        stop = at + itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(raw)))
        opened.write(raw)
        opened.truncate(8 + len(raw) + at)


def write_llama(folder: Path, config: dict[str, Any], dtype: str = "BF16") -> Path:
    """A model folder with the headers of these sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    itemsize = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    write_sparse(folder / "model.safetensors", llama_shapes(config), dtype, itemsize)
    return folder


def write_adapter(folder: Path, config: dict[str, Any], rank: int) -> Path:
    """A LoRA adapter of all seven matrices of every layer."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    sides: Shapes = {}
    for name, shape in llama_shapes(config).items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            sides[f"{module}.lora_A.weight"] = (rank, shape[1])
            sides[f"{module}.lora_B.weight"] = (shape[0], rank)
    write_sparse(folder / "adapter_model.safetensors", sides)
    return folder
