"""Small perceptrons on transformed digits: a base and an expert for each way to look at scans."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.running import ROOT
from experiments.zoo.digits_data import DOMAINS, Images, load_images, partition

Array = npt.NDArray[np.float32]

FOLDER = ROOT / "runs" / "league"
#: Inputs, hidden units, outputs.
LAYERS = (64, 48, 48, 48, 10)
#: Numbers of all layers; a row is what one unit reads, its bias last.
SIZE = sum(out * (width + 1) for width, out in itertools.pairwise(LAYERS))
#: Scans that are searched on, and those that are held out; the rest is trained on.
SCANS = {"search": 400, "test": 600}
#: Steps of the base, by number of experts: more domains take longer.
BASE_STEPS = {4: 60, 8: 300}
EXPERT_STEPS = 200
BATCH = 64

#: What the experts' domains do to images ``(n, 8, 8)``; four experts know the first four.
VIEWS: Mapping[str, Callable[[Images], Images]] = {
    **DOMAINS,
    "transposed": lambda images: images.transpose(0, 2, 1),
    "shifted": lambda images: np.roll(images, 2, axis=2),
    "shuffled": lambda images: images[:, np.array([3, 0, 6, 1, 7, 4, 2, 5])],
    "upside down": lambda images: images[:, ::-1],
}


@dataclass(frozen=True, eq=False)
class Data:
    """Scans in every domain.

    Attributes:
        inputs: Split -> ``(domains, scans, 64)``.
        digits: Split -> ``(scans,)``.
    """

    inputs: Mapping[str, Array]
    digits: Mapping[str, npt.NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Zoo:
    """Trained weights, flat.

    Attributes:
        base: ``(SIZE,)``.
        vectors: Expert minus base ``(experts, SIZE)``.
        data: What they were trained and are scored on.
    """

    base: Array
    vectors: Array
    data: Data


def row_numbers() -> npt.NDArray[np.int64]:
    """Which row, of all layers' rows, each flat weight belongs to ``(SIZE,)``."""
    lengths = [width + 1 for width, out in itertools.pairwise(LAYERS) for _ in range(out)]
    return np.repeat(np.arange(len(lengths)), lengths)


def forward(flat: Any, inputs: Any, relu: Callable[[Any], Any]) -> Any:
    """Logits ``(n, 10)`` of flat weights, of numpy or of torch."""
    offset = 0
    for width, out in itertools.pairwise(LAYERS):
        layer = flat[offset : offset + out * (width + 1)].reshape(out, width + 1)
        offset += out * (width + 1)
        inputs = inputs @ layer[:, :width].T + layer[:, width]
        if offset < SIZE:
            inputs = relu(inputs)
    return inputs


def rightly(flat: Array, inputs: Array, digits: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which inputs the network of these weights names rightly ``(n,)``."""
    logits = forward(flat, inputs, lambda hidden: np.maximum(hidden, np.float32(0.0)))
    return np.asarray(logits.argmax(axis=1) == digits)


@cache
def load_zoo(experts: int, seed: int) -> Zoo:
    """The zoo of a seed, trained once and kept in ``runs/league``."""
    data = _data(list(VIEWS)[:experts], seed)
    path = FOLDER / f"perceptron-{experts}-{seed}.npy"
    if not path.is_file():
        _save(path, _train(data, experts, seed))
    weights = np.load(path)
    return Zoo(weights[0], weights[1:] - weights[0], data)


def _data(views: Sequence[str], seed: int) -> Data:
    images, digits = load_images()
    splits = partition(len(digits), SCANS, seed)
    inputs = {
        name: np.stack([VIEWS[view](images[rows]).reshape(len(rows), -1) for view in views])
        for name, rows in splits.items()
    }
    return Data(inputs, {name: digits[rows] for name, rows in splits.items()})


def _save(path: Path, weights: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may train the same zoo at once: each writes a file of its own first.
    own = path.with_suffix(f".{np.random.SeedSequence().entropy}.npy")
    np.save(own, weights)
    own.replace(path)


def _train(data: Data, experts: int, seed: int) -> Array:
    """Weights of the base, then of each expert ``(1 + experts, SIZE)``."""
    rng = np.random.default_rng([seed, 5])
    scales = [
        np.concatenate([np.full(width, np.sqrt(2.0 / width)), [0.0]])
        for width, out in itertools.pairwise(LAYERS)
        for _ in range(out)
    ]
    fresh = (np.concatenate(scales) * rng.standard_normal(SIZE)).astype(np.float32)
    base = _descend(fresh, data, range(experts), BASE_STEPS[experts], 2e-3, rng)
    tuned = [_descend(base, data, [own], EXPERT_STEPS, 2e-3, rng) for own in range(experts)]
    return np.stack([base, *tuned])


def _descend(
    flat: Array,
    data: Data,
    domains: Sequence[int],
    steps: int,
    rate: float,
    rng: np.random.Generator,
) -> Array:
    """Weights after steps of Adam on training scans of some domains."""
    import torch

    inputs = data.inputs["training"]
    digits = data.digits["training"]
    weights = torch.from_numpy(flat.copy()).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=rate)
    for _ in range(steps):
        rows = rng.integers(len(digits), size=BATCH)
        images = torch.from_numpy(inputs[rng.choice(domains, size=BATCH), rows])
        logits = forward(weights, images, torch.relu)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(digits[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return weights.detach().numpy()
