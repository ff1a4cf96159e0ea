"""Families whose experts have heads of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mergesearch.merging import Field, Recipe, Source
from mergesearch.merging.family.family import open_family
from mergesearch.merging.policies import TensorPolicies

State = dict[str, torch.Tensor]


def labelled(labels: Sequence[str]) -> dict[str, Any]:
    """The settings of a classifier of these labels."""
    numbers = {str(number): label for number, label in enumerate(labels)}
    return {"id2label": numbers, "label2id": {v: int(k) for k, v in numbers.items()}}


def relabelled(
    copy_of: Callable[..., Path], folder: Path, labels: Sequence[str], seed: int = 0
) -> Path:
    """A copy of a classifier with a head of its own for these labels."""
    generator = torch.Generator().manual_seed(seed + 10)

    def change(tensors: State) -> State:
        shape = tensors["classifier.weight"].shape
        return tensors | {
            "classifier.weight": torch.randn((len(labels), *shape[1:]), generator=generator),
            "classifier.bias": torch.randn(len(labels), generator=generator),
        }

    return copy_of(folder, change, **labelled(labels))


def headless(copy_of: Callable[..., Path], folder: Path) -> Path:
    """A copy of a classifier without its head."""
    return copy_of(folder, lambda t: {n: v for n, v in t.items() if "classifier" not in n})


def without_prefix(copy_of: Callable[..., Path], folder: Path, prefix: str) -> Path:
    """A copy without a head whose names begin after ``prefix``, as models without heads have."""

    def change(tensors: State) -> State:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    return copy_of(folder, change, architectures=["ViTModel"])


def headed_recipe(
    base: Path,
    experts: dict[str, Path],
    coefficients: Sequence[float] = (0.25, 0.5),
    operator: str = "task_arithmetic",
    **special: Any,
) -> Recipe:
    """A merge of experts by name under policies."""
    recipe = Recipe(
        Source("base", str(base)),
        tuple(Source(name, str(path)) for name, path in experts.items()),
        operator,
        Field.constant(1, coefficients),
        special=TensorPolicies.model_validate(special).choices,
    )
    return recipe.with_field(Field.constant(open_family(recipe).layout.size, coefficients))


def save_modalities(folder: Path) -> dict[str, Path]:
    """A language model, one tuned for texts, and one inside a model that sees."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    text = LlamaConfig(vocab_size=40, max_position_embeddings=64, initializer_range=0.2, **shape)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {
            "base": LlamaForCausalLM(text),
            "words": LlamaForCausalLM(text),
            "seeing": LlavaForConditionalGeneration(
                LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
            ),
        }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}
