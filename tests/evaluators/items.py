"""Items in real files and models of a few thousand parameters for the tests of the evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.evaluators import Candidate, Evaluator
from mergesearch.evaluators.spec.evaluators import build_evaluator, parse_evaluators
from mergesearch.merging import Field, Recipe, Source

LABELS = 4
SIDE = 8
TOKENS = 20
DOMAINS = ("day", "night")


def recipe_at(x: Sequence[float]) -> Recipe:
    """The recipe of an analytic problem with coefficients ``x``."""
    values = np.asarray(x, dtype=np.float64)[None]
    return Recipe(Source("", ""), (), "task_arithmetic", Field(np.arange(values.size + 1), values))


def candidate_at(x: Sequence[float], model: Any = None) -> Candidate:
    """What a worker hands to an evaluator."""
    return Candidate(recipe_at(x), model)


def build(*sections: dict[str, Any], folder: Path = Path()) -> Evaluator:
    """An evaluator from the plain data of a study file."""
    return build_evaluator(parse_evaluators(sections), folder)


def opened(*sections: dict[str, Any], folder: Path = Path()) -> Evaluator:
    """The same, checked and opened."""
    evaluator = build(*sections, folder=folder)
    evaluator.check()
    evaluator.open()
    return evaluator


def columns(count: int, seed: int, *, side: int = SIDE) -> dict[str, Any]:
    """Columns of ``count`` random items, the two domains taking turns."""
    generator = np.random.default_rng(seed)
    return {
        "pixels": generator.standard_normal((count, side, side)).astype("float32").tolist(),
        "label": generator.integers(0, LABELS, count).tolist(),
        "domain": [DOMAINS[index % 2] for index in range(count)],
        "id": [f"{seed}-{index}" for index in range(count)],
    }


def save(
    folder: Path, splits: dict[str, dict[str, Any]], features: Any = None, *, shards: int = 1
) -> Path:
    """Write a ``datasets`` folder from split name -> columns."""
    import datasets

    silenced = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        made = {
            name: datasets.Dataset.from_dict(table, features=features)
            for name, table in splits.items()
        }
        datasets.DatasetDict(made).save_to_disk(str(folder), num_shards=dict.fromkeys(made, shards))
    finally:
        if not silenced:
            datasets.enable_progress_bars()
    return folder


def three_splits(count: int = 20, **options: Any) -> dict[str, dict[str, Any]]:
    """Search, validation and test items, disjoint."""
    return {
        name: columns(count, seed, **options)
        for seed, name in enumerate(("search", "validation", "test"))
    }


def classification(data: Path | str, *objectives: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A ``classification`` section with the usual columns."""
    section: dict[str, Any] = {
        "kind": "classification",
        "data": str(data),
        "domain": "domain",
        "id": "id",
    }
    return section | ({"objectives": list(objectives)} if objectives else {}) | options


def pico_llama(seed: int = 0, **options: Any) -> Any:
    """A Llama of two blocks and tied embeddings, for token ids below ``TOKENS``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": TOKENS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.5,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | options))).eval()


def token_splits(count: int = 8) -> dict[str, dict[str, Any]]:
    """Sequences of 3 to 9 tokens, disjoint in the three splits.

    In ``labels`` the first two tokens do not count.
    """
    splits = {}
    for seed, name in enumerate(("search", "validation", "test")):
        generator = np.random.default_rng([seed, 1])
        ids = [
            generator.integers(1, TOKENS, generator.integers(3, 10)).tolist() for _ in range(count)
        ]
        splits[name] = {
            "input_ids": ids,
            "labels": [[-100, -100, *row[2:]] for row in ids],
            "domain": [DOMAINS[index % 2] for index in range(count)],
            "id": [f"{seed}-{index}" for index in range(count)],
        }
    return splits


def pico_vit(seed: int = 0) -> Any:
    """A ViT of two blocks of width 16, whose weights make its answers differ between items."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=4,
        num_channels=1,
        num_labels=LABELS,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.manual_seed(seed)
        return ViTForImageClassification(config).eval()
