"""Tiny models of the architectures that mergekit describes, saved by transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
#: What other families call these sizes, and what they need beside them.
_MORE: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "GPTBigCode": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "Gemma3": {"head_dim": 8},
    "Qwen3": {"head_dim": 8},
    "Glm4": {"head_dim": 8},
}
_CONFIGURATIONS = {"Gemma3": "Gemma3TextConfig"}
_HEADS = (
    *("ForCausalLM", "LMHeadModel", "ForSequenceClassification"),
    *("ForTokenClassification", "ForMaskedLM"),
)


@dataclass(frozen=True)
class Saved:
    """A base and its experts."""

    base: Path
    experts: tuple[Path, Path]


def save_family(architecture: str, folder: Path) -> Saved:
    """Save a base of an architecture and two experts that differ from it everywhere."""
    import transformers

    family = next(architecture.removesuffix(head) for head in _HEADS if architecture.endswith(head))
    config_class = getattr(transformers, _CONFIGURATIONS.get(family, f"{family}Config"))
    config = config_class(**(_SIZES | _MORE.get(family, {})))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = getattr(transformers, architecture)(config)
    base.save_pretrained(folder / "base")
    for seed, name in enumerate(("one", "two"), 1):
        generator = torch.Generator().manual_seed(seed)
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        expert.save_pretrained(folder / name)
    return Saved(folder / "base", (folder / "one", folder / "two"))
