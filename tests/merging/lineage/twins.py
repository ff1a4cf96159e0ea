"""Tiny transformers and their twins: other elements, the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
#: Family -> model class, configuration class, settings.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Queries share keys, positions are rotary, no biases.
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_key_value_heads": 2}),
    # Biases of queries, keys and values.
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SIZES, "num_key_value_heads": 2}),
    # Biases everywhere, no rotary positions.
    "bert": ("BertModel", "BertConfig", SIZES),
    # One matrix for all three, stored (in, out).
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32},
    ),
    # One matrix for all three, head by head; a quarter of each head is rotary.
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
}
TOKENS = torch.arange(24).reshape(2, 12)


def build(family: str, seed: int) -> torch.nn.Module:
    """A model whose weights are all drawn, biases too."""
    import transformers

    model_class, config_class, settings = FAMILIES[family]
    quiet = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, config_class)(**settings, **quiet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.5)
    return model.eval()


def answers(family: str, state: State) -> torch.Tensor:
    """What a model of these weights answers."""
    model = build(family, 0)
    model.load_state_dict(state)
    with torch.no_grad():
        return model(TOKENS)[0]


def save(folder: Path, family: str, state: State) -> Path:
    """A checkpoint folder of these weights."""
    folder.mkdir(parents=True)
    config = build(family, 0).config.to_dict()
    (folder / "config.json").write_text(json.dumps(config, default=str))
    kept = {name: t.clone().contiguous() for name, t in state.items() if name != "lm_head.weight"}
    tied = bool(config.get("tie_word_embeddings")) and "lm_head.weight" in state
    stored = kept if tied else {name: tensor.clone() for name, tensor in state.items()}
    save_file(stored, folder / "model.safetensors")
    return folder


def changed(state: State, change: Callable[[State, torch.Generator], None], seed: int = 7) -> State:
    """A copy that a function changes in place."""
    copy = {name: tensor.clone() for name, tensor in state.items()}
    change(copy, torch.Generator().manual_seed(seed))
    return copy


def fine_tuned(state: State, generator: torch.Generator) -> None:
    """Moves every matrix by a tenth of its length."""
    for tensor in state.values():
        if tensor.ndim > 1:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor += 0.1 * noise * tensor.norm() / noise.norm()


def permuted_units(state: State, generator: torch.Generator) -> None:
    """Hidden units of every gated MLP in another order."""
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"model.layers.{layer}.mlp."
        order = torch.randperm(SIZES["intermediate_size"], generator=generator)
        for word in ("gate_proj", "up_proj"):
            state[f"{where}{word}.weight"][:] = state[f"{where}{word}.weight"][order]
        state[f"{where}down_proj.weight"][:] = state[f"{where}down_proj.weight"][:, order]


def permuted_heads(state: State, generator: torch.Generator) -> None:
    """Groups of heads in another order."""
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"model.layers.{layer}.self_attn."
        for word, axis in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
            tensor = state[f"{where}{word}.weight"]
            tensor[:] = torch.cat(tensor.chunk(2, axis)[::-1], axis)


def locked_values(state: State, generator: torch.Generator) -> None:
    """Values and outputs of each group multiplied by an invertible matrix and its inverse."""
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"model.layers.{layer}.self_attn."
        for group in range(2):
            turn = torch.randn(16, 16, generator=generator)
            values = state[f"{where}v_proj.weight"][16 * group : 16 * group + 16]
            values[:] = turn @ values
            bias = state.get(f"{where}v_proj.bias")
            if bias is not None:
                bias[16 * group : 16 * group + 16] = turn @ bias[16 * group : 16 * group + 16]
            for head in (2 * group, 2 * group + 1):
                out = state[f"{where}o_proj.weight"][:, 16 * head : 16 * head + 16]
                out[:] = out @ torch.linalg.inv(turn)


def rotated_keys(state: State, generator: torch.Generator) -> None:
    """Queries and keys turned and scaled pair by pair, which rotary positions do not see."""
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"model.layers.{layer}.self_attn."
        angles = 0.5 + 2 * torch.rand(2, 8, generator=generator)
        scales = torch.exp(torch.randn(2, 8, generator=generator))
        for word, heads, sign in (("q_proj", 4, 1.0), ("k_proj", 2, -1.0)):
            for kind in ("weight", "bias"):
                tensor = state.get(f"{where}{word}.{kind}")
                if tensor is None:
                    continue
                for head in range(heads):
                    group = head * 2 // heads
                    part = tensor[16 * head : 16 * head + 16]
                    one = part[:8].clone()
                    other = part[8:].clone()
                    shape = (-1, *[1] * (tensor.ndim - 1))
                    size = (scales[group] ** sign).view(shape)
                    cosines = torch.cos(angles[group]).view(shape)
                    sines = torch.sin(angles[group]).view(shape)
                    part[:8] = size * (cosines * one - sines * other)
                    part[8:] = size * (sines * one + cosines * other)


def swapped_keys(state: State, generator: torch.Generator) -> None:
    """Queries and keys of Llama turned across pairs: rotary positions do see it."""
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"model.layers.{layer}.self_attn."
        turn = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
        for word, heads in (("q_proj", 4), ("k_proj", 2)):
            for head in range(heads):
                part = state[f"{where}{word}.weight"][16 * head : 16 * head + 16]
                part[:] = turn @ part


def turned_keys(state: State, generator: torch.Generator) -> None:
    """Queries and keys of each head of a BERT multiplied by matrices that cancel (MergeLock)."""
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"encoder.layer.{layer}.attention.self."
        for head in range(4):
            turn = torch.randn(16, 16, generator=generator)
            rows = slice(16 * head, 16 * head + 16)
            for kind in ("weight", "bias"):
                state[f"{where}query.{kind}"][rows] = turn @ state[f"{where}query.{kind}"][rows]
                state[f"{where}key.{kind}"][rows] = (
                    torch.linalg.inv(turn).T @ state[f"{where}key.{kind}"][rows]
                )


def turned_fused_keys(state: State, generator: torch.Generator) -> None:
    """The same for GPT-2, whose matrices are (in, out) and one."""
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"transformer.h.{layer}.attn.c_attn."
        for head in range(4):
            turn = torch.randn(16, 16, generator=generator)
            for kind in ("weight", "bias"):
                tensor = state[f"{where}{kind}"]
                for start, matrix in ((0, turn), (64, torch.linalg.inv(turn).T)):
                    part = tensor[..., start + 16 * head : start + 16 * head + 16]
                    part[:] = part @ matrix.T


def turned_neox_values(state: State, generator: torch.Generator) -> None:
    """Values and outputs of GPT-NeoX, whose queries, keys and values alternate head by head."""
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"gpt_neox.layers.{layer}.attention."
        for head in range(4):
            turn = torch.randn(16, 16, generator=generator)
            for kind in ("weight", "bias"):
                part = state[f"{where}query_key_value.{kind}"][48 * head + 32 : 48 * head + 48]
                part[:] = turn @ part
            out = state[f"{where}dense.weight"][:, 16 * head : 16 * head + 16]
            out[:] = out @ torch.linalg.inv(turn)


def rescaled_keys(state: State, generator: torch.Generator) -> None:
    """Queries five times as long, keys a fifth."""
    for name, tensor in state.items():
        if ".q_proj." in name:
            tensor *= 5
        if ".k_proj." in name:
            tensor /= 5


def rescaled_units(state: State, generator: torch.Generator) -> None:
    """Each unit of a gated MLP with a factor, and the columns that read it with its inverse."""
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"model.layers.{layer}.mlp."
        factors = torch.exp(1 + torch.rand(SIZES["intermediate_size"], generator=generator))
        state[f"{where}up_proj.weight"] *= factors[:, None]
        state[f"{where}down_proj.weight"] /= factors
