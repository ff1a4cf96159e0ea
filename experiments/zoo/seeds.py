"""Makes the seeds zoo: models of one task that share no start, so that their units do not line up.

``python -m experiments.zoo.seeds [--out zoo/seeds] [--seed 0] [--measure]``

Two ViTs and two ResNets learn upright digits, each from initial weights of its own, and a third
ResNet learns inverted ones. The averages of two are what ``--measure`` prints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.zoo import digits
from experiments.zoo.building import (
    Maker,
    build_beside,
    holds,
    make_zoo,
    one_thread,
    write_manifest,
)
from experiments.zoo.digits import Training
from experiments.zoo.digits_data import Indices, in_domain, load_images, partition

#: Raised when the same settings begin to mean another zoo.
FORMAT = 1
#: Model -> what it learns.
MODELS: Mapping[str, str] = {
    "vit/a": "upright",
    "vit/b": "upright",
    "resnet/a": "upright",
    "resnet/b": "upright",
    "resnet/c": "inverted",
}
#: How each kind is trained.
VIT = Training(steps=300, rate=2e-3)
RESNET = Training(steps=150, rate=2e-3)
#: Folder of items -> the domains that its images are shown in.
ITEMS: Mapping[str, tuple[str, ...]] = {"upright": ("upright",), "both": ("upright", "inverted")}
#: Shares of the second model in the averages that are measured.
LINE = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Settings:
    """What the zoo follows from.

    Attributes:
        seed: Seed of the partition, the initial weights and the batches.
        vit: How ViTs are trained.
        resnet: How ResNets are trained.
        width: Channels of the first stage of the ResNets.
        images: Scans behind each split; the rest is for training.
    """

    seed: int = 0
    vit: Training = VIT
    resnet: Training = RESNET
    width: int = 32
    images: Mapping[str, int] = field(
        default_factory=lambda: {"search": 400, "validation": 250, "test": 350}
    )

    @property
    def of_digits(self) -> digits.Settings:
        """What the digits zoo's training needs."""
        return digits.Settings(seed=self.seed, images=self.images)


def build_seeds(out: Path = Path("zoo/seeds"), settings: Settings | None = None) -> Path:
    """Make the zoo in ``out``, or reuse it if it is there with the same settings.

    Raises:
        InputError: If ``out`` is something else than a seeds zoo.
    """
    chosen = settings or Settings()
    build_beside(out, "seeds", lambda: is_complete(out, chosen), lambda new: _write(new, chosen))
    return out


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether ``out`` holds the zoo of ``settings``."""
    return holds(out, FORMAT, settings)


def _write(folder: Path, settings: Settings) -> None:
    """Train and save everything; the manifest comes last."""
    started = time.perf_counter()
    splits = partition(len(load_images()[1]), settings.images, settings.seed)
    accuracy = {}
    for index, (name, domain) in enumerate(MODELS.items()):
        kind = name.split("/")[0]
        seed = settings.seed + 100 + index
        model = new_vit(settings, seed) if kind == "vit" else new_resnet(settings, seed)
        training = settings.vit if kind == "vit" else settings.resnet
        digits.train(model, (domain,), settings.of_digits, training, seed + 100)
        model.save_pretrained(folder / name)
        accuracy[name] = digits.accuracies(model, splits["test"])
    for name, domains in ITEMS.items():
        _save_items(folder / "data" / name, domains, {n: splits[n] for n in settings.images})
    write_manifest(
        folder, FORMAT, settings, started, accuracy=accuracy, test_images=splits["test"].tolist()
    )


def new_vit(settings: Settings, seed: int) -> Any:
    """An untrained ViT."""
    return digits.new_model(replace(settings.of_digits, seed=seed))


def new_resnet(settings: Settings, seed: int) -> Any:
    """An untrained ResNet."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    names = {digit: str(digit) for digit in range(10)}
    config = ResNetConfig(
        num_channels=1,
        embedding_size=settings.width,
        hidden_sizes=[settings.width, 2 * settings.width],
        depths=[1, 1],
        layer_type="basic",
        id2label=names,
        label2id={name: digit for digit, name in names.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNetForImageClassification(config)


def _save_items(folder: Path, domains: Sequence[str], splits: Mapping[str, Indices]) -> None:
    """Write a ``datasets.DatasetDict`` of the scans as they look in some domains."""
    import datasets

    images, labels = load_images()
    features = datasets.Features(
        {
            "pixels": datasets.Array2D((8, 8), "float32"),
            "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
    )
    datasets.disable_progress_bars()
    tables = {
        name: {
            "pixels": np.concatenate([in_domain(images[chosen], domain) for domain in domains]),
            "label": np.tile(labels[chosen], len(domains)),
        }
        for name, chosen in splits.items()
    }
    datasets.DatasetDict(
        {n: datasets.Dataset.from_dict(t, features=features) for n, t in tables.items()}
    ).save_to_disk(str(folder))


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Test accuracy of averages of two models as they are, along the line between them."""
    from transformers import AutoModelForImageClassification

    chosen = np.array(json.loads((folder / "manifest.json").read_text())["test_images"])
    rows = {}
    with one_thread():
        for kind in ("vit", "resnet"):
            first, second = (
                AutoModelForImageClassification.from_pretrained(folder / kind / name).eval()
                for name in "ab"
            )
            ours = {name: tensor.clone() for name, tensor in first.state_dict().items()}
            theirs = second.state_dict()
            for share in LINE:
                first.load_state_dict(
                    {
                        n: t + share * (theirs[n] - t) if t.is_floating_point() else t
                        for n, t in ours.items()
                    }
                )
                accuracies = digits.accuracies(first, chosen)
                rows[f"{kind}, share {share}"] = {"upright": accuracies["upright"]}
    return rows


#: What the command line makes.
MAKER = Maker(
    "seeds",
    "Make two ViTs and three ResNets from starts of their own, and their items.",
    "accuracies",
    len(MODELS),
    lambda seed: Settings(seed=seed),
    is_complete,
    build_seeds,
    lambda folder, _settings: measure(folder),
    "test accuracy, %",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    make_zoo(MAKER, arguments)


if __name__ == "__main__":
    main()
