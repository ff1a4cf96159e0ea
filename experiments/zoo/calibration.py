"""Items on which operators run the experts of a zoo: search items of its domains, unlabelled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

#: Tokens of a calibration item of the skills zoo: about five questions in a row.
TOKENS = 64


def digits_calibration(zoo: Path, folder: Path) -> dict[str, Any]:
    """The option ``calibration`` for the digits zoo; its items are written below ``folder``."""
    from experiments.zoo.digits_data import DOMAINS

    domains = {name: (name,) for name in DOMAINS}
    return {
        "data": _of_domains(zoo, folder, domains),
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
        "split": "search",
    }


def segments_calibration(zoo: Path, folder: Path) -> dict[str, Any]:
    """The same for the segments zoo, of whose experts one has two domains."""
    from experiments.zoo.segments import EXPERTS

    return {
        "data": _of_domains(zoo, folder, EXPERTS),
        "model_class": "AutoModelForMaskGeneration",
        "inputs": {"pixel_values": "pixels", "input_boxes": "boxes"},
        "split": "search",
    }


def skills_calibration(zoo: Path, folder: Path) -> dict[str, Any]:
    """The same for the skills zoo: prompts and right answers in a row, cut to equal lengths."""
    from experiments.zoo.skills_data import SKILLS

    return {
        "data": {skill: _saved(folder / skill, partial(_rows, zoo, skill)) for skill in SKILLS},
        "model_class": "AutoModelForCausalLM",
        "inputs": {"input_ids": "input_ids"},
        "split": "search",
    }


def _of_domains(zoo: Path, folder: Path, domains: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Expert -> folder with the search items of its domains."""
    return {
        expert: _saved(folder / expert, partial(_items, zoo, names))
        for expert, names in domains.items()
    }


def _items(zoo: Path, names: Iterable[str]) -> Dataset:
    import datasets

    items = datasets.load_from_disk(str(zoo / "data"))["search"]
    numbers = {items.features["domain"].str2int(name) for name in names}
    return items.select([i for i, own in enumerate(items["domain"]) if own in numbers])


def _rows(zoo: Path, skill: str) -> Dataset:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(zoo / "base"), local_files_only=True)
    asked = datasets.load_from_disk(str(zoo / "data" / skill))["search"]
    text = "\n".join(f"{one['prompt']} {one['target']}" for one in asked)
    tokens = np.asarray(tokenizer(text)["input_ids"])
    whole = len(tokens) // TOKENS
    return datasets.Dataset.from_dict(
        {"input_ids": tokens[: whole * TOKENS].reshape(whole, TOKENS).tolist()}
    )


def _saved(folder: Path, make: Callable[[], Dataset]) -> str:
    """The folder, to which the items are written if they are not there yet."""
    import datasets

    if not folder.exists():
        datasets.DatasetDict({"search": make()}).save_to_disk(str(folder))
    return str(folder)


def clip_calibration(zoo: Path, _folder: Path) -> dict[str, Any]:
    """The same for the CLIP zoo, with class prompts; one folder serves all experts."""
    from experiments.zoo.clip_data import CLASSES, PROMPTS

    return {
        "data": str(zoo / "data"),
        "split": "search",
        "domain": "domain",
        "model_class": "AutoModelForZeroShotImageClassification",
        "inputs": {"pixel_values": "image"},
        "prompts": PROMPTS,
        "classes": CLASSES,
    }
