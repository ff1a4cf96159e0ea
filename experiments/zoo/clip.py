"""Makes the CLIP zoo: a tiny CLIP, four experts whose vision towers alone are fine-tuned, items.

``python -m experiments.zoo.clip [--out zoo/clip] [--seed 0] [--measure]``

As in the eight-task protocol of Ilharco 2023, "Editing Models with Task Arithmetic", the text tower
stays the base's, and the head of a task is the text features of its class prompts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.zoo.building import (
    Maker,
    build_beside,
    holds,
    make_zoo,
    scores_along,
    write_manifest,
)
from experiments.zoo.clip_data import CLASSES, PROMPTS, SIDE, make_items, save_items
from experiments.zoo.digits import LINE, Training

if TYPE_CHECKING:
    import torch

#: Raised when the same settings begin to mean another zoo.
FORMAT = 1

Items = Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Settings:
    """What the zoo follows from.

    Attributes:
        seed: Seed of the items, the initial weights and the batches.
        base: Training of both towers on all tasks.
        expert: Fine-tuning of the vision tower on one task.
        items: Items of each task in each split.
    """

    seed: int = 0
    base: Training = field(default_factory=lambda: Training(100, 2e-3, batch=32, noise=0.0))
    expert: Training = field(default_factory=lambda: Training(350, 7e-4))
    items: Mapping[str, int] = field(
        default_factory=lambda: {"search": 300, "validation": 200, "test": 400, "training": 897}
    )


def build_clip(out: Path = Path("zoo/clip"), settings: Settings | None = None) -> Path:
    """Make the zoo in ``out``, or reuse it if it is there with the same settings.

    Raises:
        InputError: If ``out`` is something else than a zoo.
    """
    chosen = settings or Settings()
    build_beside(out, "CLIP", lambda: is_complete(out, chosen), lambda fresh: _write(fresh, chosen))
    return out


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether ``out`` holds the zoo of ``settings``."""
    return holds(out, FORMAT, settings)


def section(folder: Path, *metrics: str, **options: Any) -> dict[str, Any]:
    """The ``zero_shot`` evaluator of the zoo's items."""
    return {
        "kind": "zero_shot",
        "data": {"file": str(folder / "data"), "classes": CLASSES},
        "prompts": PROMPTS,
        "domain": "domain",
        "id": "id",
        "objectives": [{"metric": metric} for metric in metrics],
        **options,
    }


def measure(folder: Path, settings: Settings) -> dict[str, dict[str, float]]:
    """Test accuracy by task of every model, and of task arithmetic along its line."""
    tests = make_items(settings.items, settings.seed)["test"]
    models = {name: _load(folder / name) for name in ("base", *CLASSES)}
    tokenizer = _tokenizer()
    return scores_along(models, LINE, lambda model: _accuracies(model, tokenizer, tests))


def _write(folder: Path, settings: Settings) -> None:
    """Train and save everything; the manifest comes last."""
    started = time.perf_counter()
    items = make_items(settings.items, settings.seed)
    tokenizer = _tokenizer()
    model = _new_model(settings.seed, tokenizer)
    _train(model, tokenizer, items["training"], settings.base, settings.seed + 1)
    accuracies = {"base": _save(model, tokenizer, folder / "base", items["test"])}
    for index, task in enumerate(CLASSES):
        expert = _load(folder / "base")
        own = {task: items["training"][task]}
        _freeze_texts(expert)
        _train(expert, tokenizer, own, settings.expert, settings.seed + 10 + index)
        accuracies[task] = _save(expert, tokenizer, folder / task, items["test"])
    save_items(folder / "data", {s: part for s, part in items.items() if s != "training"})
    write_manifest(folder, FORMAT, settings, started, accuracy=accuracies)


def _words() -> list[str]:
    """All words of prompts and classes, after those that stand for no word."""
    texts = [
        prompt.format(name)
        for task, prompts in PROMPTS.items()
        for prompt in prompts
        for name in CLASSES[task]
    ]
    return ["<pad>", "<unk>", *sorted({word for text in texts for word in text.split()}), "<eos>"]


def _tokenizer() -> Any:
    """A tokenizer of the zoo's words; the last id ends a text, as CLIP expects."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(_words())}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", numbers["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=8,
    )


def _new_model(seed: int, tokenizer: Any) -> Any:
    import torch
    from transformers import CLIPConfig, CLIPModel

    end = tokenizer.eos_token_id
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": end,
        "bos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {
        "image_size": SIDE,
        "patch_size": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
    }
    # transformers draws initial weights from the global generator and takes no other.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
        # The usual spread learns nothing in so few steps.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "class_embedding" in name:
                torch.nn.init.normal_(parameter, std=0.12)
    return model


def _freeze_texts(model: Any) -> None:
    """Leave everything as it is but the vision tower, as the protocol does."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vision_model"))


def _train(model: Any, tokenizer: Any, tasks: Items, training: Training, seed: int) -> None:
    """Adam on the cross-entropy over the class prompts of a task, the tasks taking turns."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0, fused=True)
    stored = {task: tuple(map(torch.from_numpy, pair)) for task, pair in tasks.items()}
    with torch.no_grad():
        heads = {task: _head(model, tokenizer, task) for task in stored}
    texts = model.text_projection.weight.requires_grad
    model.train()
    for step in range(training.steps):
        share = min(1.0, (step + 1) / 20) * (1 - step / training.steps)
        optimizer.param_groups[0]["lr"] = training.rate * share
        optimizer.zero_grad()
        for task, (images, labels) in stored.items():
            rows = torch.randint(len(images), (training.batch,), generator=generator)
            noise = torch.randn(images[rows].shape, generator=generator)
            head = _head(model, tokenizer, task) if texts else heads[task]
            logits = _logits(model, images[rows] + training.noise * noise, head)
            loss = torch.nn.functional.cross_entropy(logits, labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
    model.eval()


def _head(model: Any, tokenizer: Any, task: str) -> torch.Tensor:
    """Text features of a task's classes ``(classes, width)``, of length 1."""
    prompts = PROMPTS[task]
    texts = [prompt.format(name) for name in CLASSES[task] for prompt in prompts]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    features = model.get_text_features(
        input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
    ).pooler_output
    features = (features / features.norm(dim=1, keepdim=True)).unflatten(0, (-1, len(prompts)))
    mean = features.mean(dim=1)
    head: torch.Tensor = mean / mean.norm(dim=1, keepdim=True)
    return head


def _logits(model: Any, images: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    features = model.get_image_features(pixel_values=images).pooler_output
    logits: torch.Tensor = (
        model.logit_scale.exp() * (features / features.norm(dim=1, keepdim=True)) @ head.T
    )
    return logits


def _accuracies(model: Any, tokenizer: Any, tasks: Items) -> dict[str, float]:
    """Accuracy in each task."""
    import torch

    found = {}
    for task, (images, labels) in tasks.items():
        with torch.inference_mode():
            logits = _logits(model, torch.from_numpy(images), _head(model, tokenizer, task))
        found[task] = float(np.mean(logits.argmax(dim=1).numpy() == labels))
    return found


def _save(model: Any, tokenizer: Any, folder: Path, tests: Items) -> dict[str, float]:
    """Save a model with its tokenizer; returns its test accuracy by task."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _accuracies(model, tokenizer, tests)


def _load(folder: Path) -> Any:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder, local_files_only=True).eval()


#: What the command line makes.
MAKER = Maker(
    "clip",
    "Make a tiny CLIP, four experts of it and their items.",
    "accuracies",
    len(CLASSES),
    lambda seed: Settings(seed=seed),
    is_complete,
    build_clip,
    measure,
    "test accuracy, %",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    make_zoo(MAKER, arguments)


if __name__ == "__main__":
    main()
