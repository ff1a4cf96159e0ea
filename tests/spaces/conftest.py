"""Real parameter names and shapes of every supported family, from models on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from mergesearch.merging import Layout

Shapes = dict[str, tuple[int, ...]]

_TOWER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
_VISION = _TOWER | {"image_size": 8, "patch_size": 4}
_DECODER = _TOWER | {"vocab_size": 40, "num_key_value_heads": 1, "num_hidden_layers": 3}
_CLIP = {
    "text_config": _TOWER | {"vocab_size": 40, "num_hidden_layers": 2},
    "vision_config": _VISION | {"num_hidden_layers": 3},
}

FAMILIES = {
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION | {"num_hidden_layers": 3}),
    "bert": ("BertForMaskedLM", "BertConfig", _TOWER | {"vocab_size": 40, "num_hidden_layers": 3}),
    "bert-classifier": (
        "BertForSequenceClassification",
        "BertConfig",
        _TOWER | {"num_hidden_layers": 3},
    ),
    "roberta": (
        "RobertaForMaskedLM",
        "RobertaConfig",
        _TOWER | {"vocab_size": 40, "num_hidden_layers": 3},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _DECODER | {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER | {"head_dim": 8}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _DECODER | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 8},
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _DECODER | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _DECODER | {"head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER | {"head_dim": 8}),
    "clip": ("CLIPModel", "CLIPConfig", _CLIP),
    "siglip": ("SiglipModel", "SiglipConfig", _CLIP),
}


@cache
def model_shapes(family: str) -> Shapes:
    import torch
    import transformers

    model, config, options = FAMILIES[family]
    with torch.device("meta"):
        built = getattr(transformers, model)(getattr(transformers, config)(**options))
    return {
        name: tuple(parameter.shape)
        for name, parameter in built.named_parameters(remove_duplicate=False)
    }


@pytest.fixture(scope="session")
def shapes_of() -> Callable[[str], Shapes]:
    """Names and shapes of a family's parameters."""
    return model_shapes


@pytest.fixture(scope="session")
def layout_of() -> Callable[[str], Layout]:
    """Layout of a family's parameters."""
    return lambda family: Layout.build(
        {name: (shape, "float32") for name, shape in model_shapes(family).items()}
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", sorted(FAMILIES))
