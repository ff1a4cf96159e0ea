"""Pico mixtures of experts, built and saved by transformers, and items to run them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
#: Kind -> configuration class, model class, what is particular.
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 5}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 5, "moe_intermediate_size": 8, "head_dim": 4, "norm_topk_prob": True},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {"num_experts": 5, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 5}),
}
KINDS = (*_KINDS, "stacked")


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a kind's model, made once; ``stacked`` has the experts of a Qwen3 in one tensor."""
    home = tmp_path_factory.mktemp("mixtures")

    def folder(kind: str) -> Path:
        if not (home / kind).is_dir():
            save_mixture(kind, home / kind)
        return home / kind

    return folder


def save_mixture(kind: str, folder: Path) -> None:
    """Save a kind's model with weights of its own."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config, model, more = _KINDS["qwen3_moe" if kind == "stacked" else kind]
    made = getattr(transformers, model)(getattr(transformers, config)(**_SIZES, **more))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(folder)
    if kind == "stacked":
        weights = {n: t.clone() for n, t in made.state_dict().items() if n != "lm_head.weight"}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve items of eight tokens, of which the last ones of some are padding."""
    from datasets import Dataset, DatasetDict

    rng = np.random.default_rng(3)
    mask = np.ones((12, 8), dtype=int)
    mask[::3, 5:] = 0
    columns = {"input_ids": rng.integers(3, 30, (12, 8)).tolist(), "mask": mask.tolist()}
    folder = tmp_path_factory.mktemp("items") / "data"
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="session")
def recipe_text(mixture: Callable[[str], Path], items: Path) -> Callable[..., dict[str, Any]]:
    """A recipe as one writes it: kind of model, operator, hyperparameters."""

    def text(kind: str, operator: str, **options: Any) -> dict[str, Any]:
        calibration = {
            "data": str(items),
            "model_class": "AutoModelForCausalLM",
            "inputs": {"input_ids": "input_ids", "attention_mask": "mask"},
            "batch_size": 5,
        }
        hyperparameters = {"calibration": calibration, **options}
        base = str(mixture(kind))
        return {"base": base, "operator": operator, "hyperparameters": hyperparameters}

    return text


@pytest.fixture(scope="session")
def recipe(
    recipe_text: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """The same recipe, read from a file."""
    import yaml

    from mergesearch.merging.mixture.recipe import load_mixture_recipe

    def read(kind: str, operator: str, **options: Any) -> Any:
        file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe_text(kind, operator, **options)))
        return load_mixture_recipe(file)

    return read
