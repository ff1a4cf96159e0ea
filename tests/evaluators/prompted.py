"""Small CLIP and SigLIP models, their tokenizer, and images of two tasks with class names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.evaluators.items import save
from tests.evaluators.pairs import seeded

SIDE = 8
CLASSES = {"colours": ["red", "green", "blue"], "shapes": ["square", "circle"]}
WORDS = [
    *("<pad>", "<unk>", "a", "photo", "of", "picture", "drawing", "the"),
    *CLASSES["colours"],
    *CLASSES["shapes"],
    "<eos>",
]


def word_tokenizer(folder: Path) -> Any:
    """A tokenizer of these words, which ends a text with the highest id, as CLIP's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", numbers["<eos>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=8,
    )
    fast.save_pretrained(folder)
    return fast


def pico_clip(seed: int = 0, *, siglip: bool = False) -> Any:
    """A dual encoder of one block on each side."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    side = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    end = len(WORDS) - 1
    text = side | {"vocab_size": len(WORDS), "max_position_embeddings": 8}
    text |= {"eos_token_id": end, "bos_token_id": 0, "pad_token_id": 0}
    vision = side | {"image_size": SIDE, "patch_size": 4, "num_channels": 3}
    made, config = (SiglipModel, SiglipConfig) if siglip else (CLIPModel, CLIPConfig)
    options = {} if siglip else {"projection_dim": 12}
    whole = config(text_config=text, vision_config=vision, **options)
    return seeded(lambda: made(whole), seed, std=0.3)


def image_splits(count: int = 12) -> dict[str, dict[str, Any]]:
    """Pixels with class numbers of two tasks that take turns."""
    splits = {}
    tasks = list(CLASSES)
    for seed, name in enumerate(("search", "validation", "test")):
        rng = np.random.default_rng([seed, 31])
        domains = [tasks[index % 2] for index in range(count)]
        splits[name] = {
            "image": rng.standard_normal((count, 3, SIDE, SIDE)).astype("float32").tolist(),
            "label": [int(rng.integers(len(CLASSES[domain]))) for domain in domains],
            "domain": domains,
            "id": [f"{seed}-{index}" for index in range(count)],
        }
    return splits


def image_folder(folder: Path) -> Path:
    """``images`` and ``words`` (the tokenizer) in ``folder``."""
    save(folder / "images", image_splits())
    word_tokenizer(folder / "words")
    return folder


def zero_shot(folder: Path, *metrics: str, **options: Any) -> dict[str, Any]:
    """A ``zero_shot`` section."""
    return {
        "kind": "zero_shot",
        "data": {"file": str(folder / "images"), "classes": CLASSES},
        "tokenizer": str(folder / "words"),
        "domain": "domain",
        "id": "id",
        "prompts": ["a photo of a {}", "a drawing of the {}"],
        "batch_size": 5,
        "objectives": [{"metric": metric} for metric in metrics or ("accuracy",)],
        **options,
    }
