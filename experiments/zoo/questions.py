"""Makes the questions zoo: a tiny LLaVA, four experts whose language model alone is tuned, items.

``python -m experiments.zoo.questions [--out zoo/questions] [--seed 0] [--measure]``

Pictures are those of the CLIP zoo: scans of digits, drawn shapes, stripes and dots. The base learns
a little of all four questions; every expert learns one, in the matrices of its language model's
blocks, while the eye, the projector, the embeddings and the head stay the base's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.zoo.building import (
    Maker,
    build_beside,
    holds,
    make_zoo,
    scores_along,
    write_manifest,
)
from experiments.zoo.clip_data import SIDE, make_items
from experiments.zoo.digits import LINE, Training
from experiments.zoo.questions_data import (
    IMAGE,
    PATCH,
    QUESTIONS,
    Items,
    answer_tokens,
    as_stored,
    asked_tokens,
    make_processor,
    save_rows,
)

if TYPE_CHECKING:
    import torch

#: Raised when the same settings begin to mean another zoo.
FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What the zoo follows from.

    Attributes:
        seed: Seed of the items, the initial weights and the batches.
        base: Training of the whole model on all tasks.
        expert: Fine-tuning of the language model's blocks on one task.
        items: Items of each task in each split.
    """

    seed: int = 0
    base: Training = field(default_factory=lambda: Training(90, 2e-3, batch=24, noise=0.0))
    expert: Training = field(default_factory=lambda: Training(200, 1e-3, batch=48))
    items: Mapping[str, int] = field(
        default_factory=lambda: {"search": 100, "validation": 150, "test": 300, "training": 1200}
    )


def build_questions(out: Path = Path("zoo/questions"), settings: Settings | None = None) -> Path:
    """Make the zoo in ``out``, or reuse it if it is there with the same settings.

    Raises:
        InputError: If ``out`` is something else than a zoo.
    """
    chosen = settings or Settings()
    build_beside(
        out, "questions", lambda: is_complete(out, chosen), lambda fresh: _write(fresh, chosen)
    )
    return out


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether ``out`` holds the zoo of these settings."""
    return holds(out, FORMAT, settings)


def section(folder: Path) -> dict[str, Any]:
    """The ``visual_questions`` evaluator of the zoo's items, with one objective for each task."""
    return {
        "kind": "visual_questions",
        "data": str(folder / "data"),
        "answer": "answer",
        "domain": "domain",
        "id": "id",
        "max_new_tokens": 2,
        "batch_size": 100,
        "objectives": [
            {"name": task, "metric": "accuracy", "domains": [task]} for task in QUESTIONS
        ],
    }


def measure(folder: Path, settings: Settings) -> dict[str, dict[str, float]]:
    """Test accuracy by task of every model, and of task arithmetic along its line."""
    processor = make_processor()
    tests = as_stored(make_items(settings.items, settings.seed)["test"])
    models = {name: _load(folder / name) for name in ("base", *QUESTIONS)}
    return scores_along(models, LINE, lambda model: _accuracies(model, processor, tests))


def _write(folder: Path, settings: Settings) -> None:
    """Train and save everything; the manifest comes last."""
    started = time.perf_counter()
    items = make_items(settings.items, settings.seed)
    training = as_stored(items["training"])
    tests = as_stored(items["test"])
    processor = make_processor()
    model = _new_model(settings.seed, processor)
    _train(model, processor, training, settings.base, settings.seed + 1)
    accuracies = {"base": _save(model, processor, folder / "base", tests)}
    for index, task in enumerate(QUESTIONS):
        expert = _load(folder / "base")
        for name, parameter in expert.named_parameters():
            parameter.requires_grad_(is_tuned(name))
        own = {task: training[task]}
        _train(expert, processor, own, settings.expert, settings.seed + 10 + index)
        accuracies[task] = _save(expert, processor, folder / task, tests)
    save_rows(folder / "data", items)
    write_manifest(folder, FORMAT, settings, started, accuracy=accuracies)


def is_tuned(name: str) -> bool:
    """Whether experts change a tensor: a matrix of a block of the language model."""
    inside = "language_model." in name and ".layers." in name
    return inside and name.endswith("proj.weight")


def _new_model(seed: int, processor: Any) -> Any:
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    # transformers draws initial weights from the global generator and takes no other.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


def _logits(model: Any, processor: Any, task: str, images: torch.Tensor) -> torch.Tensor:
    """Logits of the answer's token ``(n, words)``."""
    import torch

    asked = torch.tensor(asked_tokens(processor, task)).expand(len(images), -1)
    found: torch.Tensor = model(input_ids=asked, pixel_values=images).logits[:, -1]
    return found


def _train(model: Any, processor: Any, tasks: Items, training: Training, seed: int) -> None:
    """Adam on the answer and the end after it, all tasks in every step."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0, fused=True)
    stored = {task: tuple(map(torch.from_numpy, pair)) for task, pair in tasks.items()}
    end = torch.full((training.batch, 1), processor.tokenizer.eos_token_id)
    model.train()
    for step in range(training.steps):
        share = min(1.0, (step + 1) / 20) * (1 - step / training.steps)
        optimizer.param_groups[0]["lr"] = training.rate * share
        optimizer.zero_grad()
        for task, (images, labels) in stored.items():
            rows = torch.randint(len(images), (training.batch,), generator=generator)
            noise = torch.randn(images[rows].shape, generator=generator)
            asked = torch.tensor(asked_tokens(processor, task)).expand(training.batch, -1)
            answer = answer_tokens(processor, task)[labels[rows]][:, None]
            read = torch.cat([asked, answer], dim=1)
            pixels = images[rows] + training.noise * noise
            logits = model(input_ids=read, pixel_values=pixels).logits[:, -2:]
            wanted = torch.cat([answer, end], dim=1)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
    model.eval()


def _accuracies(model: Any, processor: Any, tasks: Items) -> dict[str, float]:
    """Share of right answers in each task, among all words."""
    import torch

    found = {}
    for task, (images, labels) in tasks.items():
        with torch.inference_mode():
            said = _logits(model, processor, task, torch.from_numpy(images)).argmax(dim=1)
        found[task] = float(
            (said == answer_tokens(processor, task)[torch.from_numpy(labels)]).numpy().mean()
        )
    return found


def _save(model: Any, processor: Any, folder: Path, tests: Items) -> dict[str, float]:
    """Save a model with its processor; returns its test accuracy by task."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return _accuracies(model, processor, tests)


def _load(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()


#: What the command line makes.
MAKER = Maker(
    "questions",
    "Make a tiny LLaVA, four experts of it and their items.",
    "accuracies",
    len(QUESTIONS),
    lambda seed: Settings(seed=seed),
    is_complete,
    build_questions,
    measure,
    "test accuracy, %",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    make_zoo(MAKER, arguments)


if __name__ == "__main__":
    main()
