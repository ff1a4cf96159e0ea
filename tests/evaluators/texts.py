"""Items that are texts, with a tokenizer and a small language model for them, in real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.evaluators.items import DOMAINS, save
from tests.evaluators.language import make_tokenizer, sentence, text_llama

__all__ = ["bound_llama", "make_tokenizer", "sentence", "text_folder", "text_llama", "text_splits"]


def text_splits(count: int = 8) -> dict[str, dict[str, Any]]:
    """Prompts, targets and texts of different lengths, disjoint in the three splits.

    The two domains take turns.
    """
    splits = {}
    for seed, name in enumerate(("search", "validation", "test")):
        rng = np.random.default_rng([seed, 11])
        ids = [f"{seed}-{index}" for index in range(count)]
        splits[name] = {
            "prompt": [" ".join([*sentence(rng, int(rng.integers(1, 7))), one]) for one in ids],
            "target": [" ".join(sentence(rng, 2)) for _ in ids],
            "text": [" ".join([*sentence(rng, int(rng.integers(2, 30))), one]) for one in ids],
            "domain": [DOMAINS[index % 2] for index in range(count)],
            "id": ids,
        }
    return splits


def text_folder(folder: Path, chat_template: str | None = None) -> Path:
    """``texts`` and ``tokenizer`` in ``folder``."""
    save(folder / "texts", text_splits())
    make_tokenizer(folder / "tokenizer", chat_template)
    return folder


def bound_llama(folder: Path, **options: Any) -> Any:
    """Write a base and an expert to ``folder``, and return their merge, half and half."""
    from mergesearch.merging import Field, Recipe, Source
    from mergesearch.merging.models.loading import load_model
    from mergesearch.merging.resident.arena import open_arenas
    from mergesearch.merging.resident.merged_model import MergedModel

    for seed, name in enumerate(("base", "expert")):
        text_llama(seed, **options).save_pretrained(folder / name)
    base, expert = (Source(name, str(folder / name)) for name in ("base", "expert"))
    recipe = Recipe(base, (expert,), "task_arithmetic", Field.constant(1, [0.5]))
    merged = MergedModel(
        load_model(base.path, "AutoModelForCausalLM"), open_arenas(recipe, folder / "arenas")
    )
    merged.write(Field.constant(merged.merged.numel(), [0.5]))
    return merged
