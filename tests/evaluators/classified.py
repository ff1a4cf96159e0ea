"""Texts, pairs and words with classes and numbers in one file, and small BERTs for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.evaluators.items import DOMAINS
from tests.evaluators.language import make_tokenizer, sentence

CLASSES = 3


def classified_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts, pairs, classes, numbers, words and their classes."""
    rng = np.random.default_rng([seed, 21])
    rows = []
    for index in range(count):
        words = [*sentence(rng, int(rng.integers(2, 9))), f"w{seed}{index}"]
        rows.append(
            {
                "text": " ".join(words),
                "pair": " ".join(sentence(rng, int(rng.integers(1, 6)))),
                "label": int(rng.integers(CLASSES)),
                "score": float(rng.standard_normal()),
                "tokens": words,
                "tags": rng.integers(CLASSES, size=len(words)).tolist(),
                "domain": DOMAINS[index % 2],
                "id": f"{seed}-{index}",
            }
        )
    return rows


def classified_folder(folder: Path, count: int = 60) -> Path:
    """``texts.jsonl`` without splits, and ``tokenizer``."""
    lines = [json.dumps(row) for row in classified_rows(count)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    make_tokenizer(folder / "tokenizer")
    return folder


def pico_bert(task: str, seed: int = 0, *, num_labels: int = CLASSES, positions: int = 128) -> Any:
    """A BERT of one block for ``sequence`` or ``token`` classification with that tokenizer."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertForTokenClassification,
    )

    made = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification}[task]
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        num_labels=num_labels,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made(config).eval()
