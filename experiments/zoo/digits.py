"""Makes the digits zoo.

``python -m experiments.zoo.digits [--out zoo/digits] [--seed 0] [--measure]``
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.zoo.building import (
    Maker,
    build_beside,
    holds,
    make_zoo,
    one_thread,
    scores_along,
    silence_transformers,
    write_manifest,
)
from experiments.zoo.digits_data import (
    DOMAINS,
    LEVELS,
    Indices,
    in_domain,
    load_images,
    partition,
    save_items,
)

if TYPE_CHECKING:
    import torch

#: Raised when the same settings begin to mean another zoo.
FORMAT = 2

#: Coefficients of the task-arithmetic line.
LINE = tuple(round(0.05 * step, 2) for step in range(21))

Weights = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Training:
    """Steps of Adam at peak rate ``rate`` (20 steps of warm-up, then linear decay to 0)."""

    steps: int
    rate: float
    batch: int = 64
    noise: float = 0.1  # standard deviation added to pixels in [-1, 1]


@dataclass(frozen=True)
class Settings:
    """What the zoo follows from.

    Attributes:
        seed: Seed of the partition, the initial weights and the batches.
        base: Brief training on all domains: long enough to learn the digits a little, too short to
            learn them well.
        expert: Fine-tuning on one domain.
        images: Scans behind each split; the rest is for training. A split has four items per scan.
        initial_spread: ``initializer_range`` of the ViT. The usual 0.02 learns nothing in so few
            steps.
    """

    seed: int = 0
    base: Training = Training(steps=38, rate=2e-3)
    expert: Training = Training(steps=200, rate=7e-4)
    images: Mapping[str, int] = field(
        default_factory=lambda: {"search": 400, "validation": 250, "test": 350}
    )
    initial_spread: float = 0.12


def build_digits(
    out: Path = Path("zoo/digits"), settings: Settings | None = None, *, processes: int = 2
) -> Path:
    """Make the zoo in ``out``, or reuse it if it is there with the same settings.

    The zoo is written beside ``out`` and renamed when complete, so a killed build leaves nothing
    half-made there.

    Args:
        out: Folder to make.
        settings: What to make.
        processes: Experts trained at the same time; the weights do not depend on it. 1 starts no
            process.

    Raises:
        InputError: If ``out`` is something else than a digits zoo.
    """
    chosen = settings or Settings()
    build_beside(
        out,
        "digits",
        lambda: is_complete(out, chosen),
        lambda fresh: _write(fresh, chosen, processes),
    )
    return out


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether ``out`` holds the zoo of ``settings``."""
    return holds(out, FORMAT, settings)


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Test accuracy by domain of every model, and of task arithmetic along its line."""
    names = ["base", *DOMAINS]
    manifest = json.loads((folder / "manifest.json").read_text())
    chosen = np.array(manifest["test_images"])
    with one_thread():
        models = {name: _load(folder / name) for name in names}
        return scores_along(models, LINE, lambda model: accuracies(model, chosen))


def _write(folder: Path, settings: Settings, processes: int) -> None:
    """Train and save everything; the manifest comes last."""
    started = time.perf_counter()
    found = {"base": _make_base(folder, settings)}
    indices = range(len(DOMAINS))
    if processes == 1:
        rows = [_make_expert(folder, settings, index) for index in indices]
    else:
        # Spawned, for a forked torch may hang on locks that another thread held.
        with ProcessPoolExecutor(processes, get_context("spawn"), silence_transformers) as pool:
            rows = list(pool.map(partial(_make_expert, folder, settings), indices))
    found.update(zip(DOMAINS, rows, strict=True))
    splits = splits_of(settings)
    save_items(folder / "data", {name: splits[name] for name in settings.images})
    write_manifest(
        folder, FORMAT, settings, started, accuracy=found, test_images=splits["test"].tolist()
    )


def splits_of(settings: Settings) -> dict[str, Indices]:
    """Scans of each split, and those for training."""
    return partition(len(load_images()[1]), settings.images, settings.seed)


def _make_base(folder: Path, settings: Settings) -> dict[str, float]:
    """Train and save the base; its test accuracy in each domain."""
    model = new_model(settings)
    train(model, tuple(DOMAINS), settings, settings.base, settings.seed + 1)
    _save(model, folder / "base")
    return accuracies(model, splits_of(settings)["test"])


def _make_expert(folder: Path, settings: Settings, index: int) -> dict[str, float]:
    """Fine-tune and save the expert of a domain; returns its test accuracy by domain."""
    domain = list(DOMAINS)[index]
    with one_thread():
        model = _load(folder / "base")
        train(model, (domain,), settings, settings.expert, settings.seed + 10 + index)
        _save(model, folder / domain)
        return accuracies(model, splits_of(settings)["test"])


def new_model(settings: Settings) -> Any:
    """An untrained ViT."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    names = {digit: str(digit) for digit in range(10)}
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=settings.initial_spread,
        id2label=names,
        label2id={name: digit for digit, name in names.items()},
    )
    # transformers draws initial weights from the global generator and takes no other; the fork
    # gives it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return ViTForImageClassification(config)


def train(
    model: Any, domains: Sequence[str], settings: Settings, training: Training, seed: int
) -> None:
    """Adam on random batches with pixel noise, drawn from a generator of its own."""
    import torch

    images, digits = load_images()
    chosen = splits_of(settings)["training"]
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.from_numpy(
        np.concatenate([in_domain(images[chosen], domain) for domain in domains])
    )[:, None]
    labels = torch.from_numpy(np.tile(digits[chosen], len(domains)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, weight_decay=0.0, fused=True
    )
    model.train()
    for step in range(training.steps):
        optimizer.param_groups[0]["lr"] = (
            training.rate * min(1.0, (step + 1) / 20) * (1 - step / training.steps)
        )
        rows = torch.randint(len(inputs), (training.batch,), generator=generator)
        batch = inputs[rows]
        batch = batch + training.noise * torch.randn(batch.shape, generator=generator)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=batch).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
    model.eval()


def accuracies(model: Any, chosen: Indices) -> dict[str, float]:
    """Accuracy in each domain on the scans ``chosen`` ``(n,)``."""
    import torch

    images, digits = load_images()
    found = {}
    for domain in DOMAINS:
        inputs = torch.from_numpy(in_domain(images[chosen], domain))[:, None]
        with torch.inference_mode():
            guesses = model(pixel_values=inputs).logits.argmax(dim=1).numpy()
        found[domain] = float(np.mean(guesses == digits[chosen]))
    return found


def _save(model: Any, folder: Path) -> None:
    """Save a Hugging Face folder, with a processor for grey images of levels 0 to 16."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    model.save_pretrained(folder)
    ViTImageProcessorPil(
        do_resize=False,
        size={"height": 8, "width": 8},
        do_rescale=True,
        rescale_factor=1 / LEVELS,
        do_normalize=True,
        image_mean=[0.5],
        image_std=[0.5],
        do_convert_rgb=False,
    ).save_pretrained(folder)


def _load(folder: Path) -> Any:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(folder, local_files_only=True).eval()


#: What the command line makes.
MAKER = Maker(
    "digits",
    "Make a base, four experts and their items from scikit-learn's digits.",
    "accuracies",
    len(DOMAINS),
    lambda seed: Settings(seed=seed),
    is_complete,
    build_digits,
    lambda folder, _settings: measure(folder),
    "test accuracy, %",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    make_zoo(MAKER, arguments)


if __name__ == "__main__":
    main()
