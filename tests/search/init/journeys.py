"""Models, tables and folders of pictures for whole journeys, small and made in seconds."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

#: Sides of two kinds of texts: words that are good or bad in each.
SIDES = {
    "books": (("gripping", "wise", "vivid"), ("dull", "long", "flat")),
    "films": (("funny", "moving", "bright"), ("loud", "slow", "grey")),
}
NAMES = ("bad", "good")
NEUTRAL = ("the", "a", "one", "was", "very", "it", "rather", "story", "end", "scene")
#: Classes of two sets of pictures, each with a stripe of its own.
PICTURES = {"lines": ("across", "down", "corner"), "tones": ("bright", "dark")}
SIDE = 8


def make_vocabulary(folder: Path) -> None:
    """A tokenizer of whole words in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*NEUTRAL, *(word for side in SIDES.values() for half in side for word in half)]
    rows = {word: row for row, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(rows, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    fast.save_pretrained(str(folder))


def reviews(kind: str, count: int, seed: int) -> list[dict[str, str]]:
    """Rows of ``review`` and ``stars``, whose words of one kind say what they think."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        good = index % 2
        words = [*rng.choice(NEUTRAL, 4), *rng.choice(SIDES[kind][1 - good], 2)]
        rng.shuffle(words)
        rows.append({"review": " ".join(words), "stars": NAMES[good], "kind": kind})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A table with a header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_reviewers(folder: Path, steps: int = 40) -> Path:
    """``base``, and ``books`` and ``films`` trained from it on texts of one kind each."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=2 + len(NEUTRAL) + 12,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=2,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder / "base")
        make_vocabulary(folder / "base")
        for seed, kind in enumerate(SIDES):
            model = _trained(folder / "base", reviews(kind, 64, seed), steps)
            model.save_pretrained(folder / kind)
            make_vocabulary(folder / kind)
    return folder


def _trained(base: Path, rows: list[dict[str, str]], steps: int) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = tokenizer([row["review"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([NAMES.index(row["stars"]) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def make_viewers(folder: Path) -> Path:
    """A ViT ``base`` of ten classes, and experts of :data:`PICTURES` with heads of their own."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    def config(names: tuple[str, ...]) -> ViTConfig:
        return ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=SIDE,
            patch_size=4,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = ViTForImageClassification(config(tuple(f"thing {n}" for n in range(10))))
        base.save_pretrained(folder / "base")
        processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
        processor.save_pretrained(folder / "base")
        for name, classes in PICTURES.items():
            expert = ViTForImageClassification(config(classes))
            shared = {k: v for k, v in base.state_dict().items() if "classifier" not in k}
            expert.load_state_dict(shared, strict=False)
            with torch.no_grad():
                for parameter in expert.parameters():
                    parameter.add_(0.02 * torch.randn(parameter.shape))
            expert.save_pretrained(folder / name)
            processor.save_pretrained(folder / name)
    return folder


def make_pictures(folder: Path, classes: tuple[str, ...], count: int = 12) -> Path:
    """A folder of PNG files for each class."""
    from PIL import Image

    rng = np.random.default_rng(len(classes))
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 100, (SIDE, SIDE, 3))
            pixels[number * 2 : number * 2 + 2] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
