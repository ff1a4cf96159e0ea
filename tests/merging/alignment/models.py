"""Small models of common architectures, with weights that no two units share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **SIZES))


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=40, **SIZES))


def llama() -> Any:
    """Grouped queries, rotary positions, and an embedding that is the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    more = {"vocab_size": 40, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **more, tie_word_embeddings=True))


def gpt2() -> Any:
    """Queries, keys and values in one matrix, stored the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    )


def resnet() -> Any:
    """Convolutions and BatchNorm."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1]}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, layer_type="basic", **sizes))


MODELS: Mapping[str, Callable[[], Any]] = {
    "vit": vit,
    "bert": bert,
    "llama": llama,
    "gpt2": gpt2,
    "resnet": resnet,
}


def saved(name: str, folder: Path, seed: int = 0) -> str:
    """Save a model with random weights and running statistics; its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]()
        for key, tensor in model.state_dict().items():
            if "running_var" in key:
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.3)
    model.save_pretrained(folder)
    return str(folder)
