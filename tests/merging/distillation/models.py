"""A pivot and sources of other shapes, untrained, for tests end to end."""

from __future__ import annotations

from pathlib import Path

from experiments.zoo.shapes import SHAPES, Settings
from experiments.zoo.shapes_data import HOME, LANGUAGES, texts


def save_models(folder: Path, count: int = 24) -> list[str]:
    """Write a pivot and a source for each language, and return texts of one of them."""
    found = {name: texts(name, count, [0]) for name in (HOME, *LANGUAGES)}
    for name, shape in SHAPES.items():
        tokenizer = shape.tokenizer([*found[HOME], *found.get(name, [])])
        model = shape.model(len(tokenizer), Settings(width=16))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return found[LANGUAGES[0]]
