"""Models and items in the places that the pages of the journeys name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.evaluators.language import make_tokenizer, sentence, text_llama
from tests.evaluators.masks import pico_sam
from tests.merging.checkpoints.test_adapter import pair, write_adapter
from tests.search.cli.test_cli import mergesearch
from tests.search.init.journeys import (
    PICTURES,
    make_pictures,
    make_reviewers,
    make_viewers,
    reviews,
    write_csv,
    write_lines,
)


def reviewers(folder: Path) -> None:
    """What docs/quickstart.md begins with."""
    make_reviewers(folder / "models")
    write_csv(folder / "reviews.csv", reviews("books", 60, 7) + reviews("films", 60, 8))


def imported(folder: Path) -> None:
    """What docs/journeys/mergekit.md begins with: the quickstart's models, and a run of them."""
    reviewers(folder)
    models = [f"models/{name}" for name in ("base", "books", "films")]
    study = folder / "reviews.yaml"
    init = ("init", *models, "--data", "reviews.csv", "--out", study, "--minutes", 0.02)
    for command in (init, ("run", study, "--progress", "quiet")):
        code, _, err = mergesearch(*command)
        assert code == 0, err


def viewers(folder: Path) -> None:
    """What docs/journeys/classifiers.md begins with."""
    make_viewers(folder / "models")
    for name, classes in PICTURES.items():
        make_pictures(folder / "pictures" / name, classes)


def writers(folder: Path) -> None:
    """What docs/journeys/language-models.md begins with."""
    text_llama().save_pretrained(folder / "models" / "base")
    make_tokenizer(folder / "models" / "base")
    rng = np.random.default_rng(0)
    (folder / "adapters").mkdir()
    for seed, (name, file) in enumerate({"poet": "poems", "clerk": "letters"}.items()):
        modules = [f"model.layers.{b}.self_attn.{m}_proj" for b in (0, 1) for m in ("q", "v")]
        tensors: dict[str, torch.Tensor] = {}
        for place, module in enumerate(modules):
            tensors |= pair(16, 16, seed=10 * seed + place, module=module)
        base = str(folder / "models" / "base")
        settings = {"base_model_name_or_path": base, "target_modules": ["q_proj", "v_proj"]}
        write_adapter(folder / "adapters" / name, tensors, **settings)
        rows = [
            {"prompt": " ".join([*sentence(rng), str(n)]), "target": " ".join(sentence(rng, 2))}
            for n in range(30)
        ]
        write_lines(folder / f"{file}.jsonl", rows)
    texts = [{"text": " ".join([*sentence(rng, 9), str(n)])} for n in range(40)]
    write_csv(folder / "general.csv", texts)


def segmenters(folder: Path) -> None:
    """What docs/journeys/segmentation.md begins with."""
    base = pico_sam()
    base.save_pretrained(folder / "models" / "base")
    for seed, name in enumerate(("tomography", "sonography"), 1):
        _moved(base, seed).save_pretrained(folder / "models" / name)


def _moved(model: Any, seed: int) -> Any:
    """The model, further from where it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


#: Page in docs/ -> what makes the models and items that it begins with.
PREPARED: dict[str, Callable[[Path], None]] = {
    "quickstart.md": reviewers,
    "journeys/classifiers.md": viewers,
    "journeys/language-models.md": writers,
    "journeys/mergekit.md": imported,
    "journeys/segmentation.md": segmenters,
}
