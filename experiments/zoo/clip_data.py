"""Makes the images of the CLIP zoo: scikit-learn's digits, and three tasks that are drawn.

Images are ``(n, 3, 12, 12)`` with values in [-1, 1]: a figure in one colour on a darker
ground, both random, with noise, so that no colour gives a class away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.zoo.digits_data import LEVELS

Images = npt.NDArray[np.float32]
Mask = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

SIDE = 12
#: Task -> names of its classes in the order of their numbers.
CLASSES: dict[str, list[str]] = {
    "digits": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "shapes": ["disc", "ring", "square", "triangle", "cross"],
    "stripes": ["horizontal", "vertical", "rising", "falling", "checked"],
    "counts": ["single", "pair", "trio", "quartet", "quintet"],
}
#: Task -> its prompts.
PROMPTS: dict[str, list[str]] = {
    "digits": ["a scan of the number {}", "the digit {} written by hand"],
    "shapes": ["a drawing of a {}", "a small {}"],
    "stripes": ["a {} pattern", "stripes that are {}"],
    "counts": ["a {} of dots", "dots in a {}"],
}
#: Standard deviation of the noise on every pixel.
NOISE = 0.15


def draw(task: str, count: int, seed: Sequence[int]) -> tuple[Images, Labels]:
    """Random images of a drawn task, and their class numbers ``(n,)``."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(CLASSES[task]), size=count)
    masks = np.stack([_DRAWN[task](int(label), rng) for label in labels])
    return coloured(masks, rng), labels


def digit_images(chosen: npt.NDArray[np.intp], seed: Sequence[int]) -> tuple[Images, Labels]:
    """Scans with the given indices, in colours, and their digits ``(n,)``."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    scans = load_digits()
    masks = np.zeros((len(chosen), SIDE, SIDE))
    for row, scan in enumerate(scans.images[chosen] / LEVELS):
        masks[row, 2:10, 2:10] = scan
    return coloured(masks, rng), scans.target[chosen].astype(np.int64)


def coloured(masks: Mask, rng: np.random.Generator) -> Images:
    """Figures in one colour on a darker one, with noise.

    Args:
        masks: How much of a pixel is figure ``(n, 12, 12)``, 0 to 1.
        rng: Draws the colours and the noise.
    """
    shape = (len(masks), 3, 1, 1)
    ground = rng.uniform(-1, 0, shape)
    figure = ground + rng.uniform(0.7, 1.0, shape)
    mask = masks[:, None]
    pixels = mask * figure + (1 - mask) * ground
    return (pixels + NOISE * rng.standard_normal(pixels.shape)).clip(-1, 1).astype(np.float32)


def _shape(label: int, rng: np.random.Generator) -> Mask:
    y, x = np.mgrid[:SIDE, :SIDE]
    radius = rng.uniform(2.5, 4.5)
    cy, cx = rng.uniform(4.5, 6.5, size=2)
    far = np.hypot(y - cy, x - cx)
    flat = np.maximum(abs(y - cy), abs(x - cx))
    across = np.minimum(abs(y - cy), abs(x - cx))
    triangle = (y - cy < radius * 0.7) & (abs(x - cx) < (y - cy + radius) * 0.6)
    masks = (
        far <= radius,
        (far <= radius) & (far > radius - 1.6),
        flat <= radius * 0.85,
        triangle & (y - cy > -radius),
        (across < 1.1) & (flat <= radius),
    )
    chosen: Mask = masks[label].astype(np.float64)
    return chosen


def _stripes(label: int, rng: np.random.Generator) -> Mask:
    y, x = np.mgrid[:SIDE, :SIDE]
    period = rng.uniform(2.5, 5.0)
    phase = rng.uniform(0, period)
    along = (y, x, (y + x) / np.sqrt(2), (y - x) / np.sqrt(2))
    if label == 4:
        checked: Mask = ((y + phase) // (period / 2) + (x + phase) // (period / 2)) % 2
        return checked
    striped: Mask = ((along[label] + phase) % period < period / 2).astype(np.float64)
    return striped


def _dots(label: int, rng: np.random.Generator) -> Mask:
    """One to five dots of two by two pixels that do not touch."""
    mask = np.zeros((SIDE, SIDE))
    cells = rng.permutation(9)[: label + 1]
    for cell in cells:
        top, left = 4 * (cell // 3) + rng.integers(0, 3), 4 * (cell % 3) + rng.integers(0, 3)
        mask[top : top + 2, left : left + 2] = 1
    return mask


_DRAWN: Mapping[str, Callable[[int, np.random.Generator], Mask]] = {
    "shapes": _shape,
    "stripes": _stripes,
    "counts": _dots,
}


def make_items(sizes: Mapping[str, int], seed: int) -> dict[str, dict[str, tuple[Images, Labels]]]:
    """Split -> task -> images and class numbers; ``training`` is one of the splits.

    Digits have at most as many items as there are scans left.
    """
    order = np.random.default_rng(seed).permutation(1797)
    items: dict[str, dict[str, tuple[Images, Labels]]] = {}
    start = 0
    for number, (split, count) in enumerate(sizes.items()):
        chosen = order[start : start + count]
        start += count
        items[split] = {"digits": digit_images(chosen, [seed, number, 0])}
        for index, task in enumerate(_DRAWN, start=1):
            items[split][task] = draw(task, count, [seed, number, index])
    return items


def save_items(folder: Path, items: Mapping[str, Mapping[str, tuple[Images, Labels]]]) -> None:
    """Write a ``datasets.DatasetDict`` of images, class numbers, tasks and ids."""
    import datasets
    from datasets import Array3D, Features, Value

    features = Features(
        {
            "image": Array3D((3, SIDE, SIDE), "float32"),
            "label": Value("int64"),
            "domain": Value("string"),
            "id": Value("string"),
        }
    )
    silenced = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        tables = {
            split: datasets.Dataset.from_dict(_table(split, tasks), features=features)
            for split, tasks in items.items()
        }
        datasets.DatasetDict(tables).save_to_disk(str(folder))
    finally:
        if not silenced:
            datasets.enable_progress_bars()


def _table(split: str, tasks: Mapping[str, tuple[Images, Labels]]) -> dict[str, object]:
    return {
        "image": np.concatenate([images for images, _ in tasks.values()]),
        "label": np.concatenate([labels for _, labels in tasks.values()]),
        "domain": [task for task, (_, labels) in tasks.items() for _ in labels],
        "id": [
            f"{split}-{task}-{n}" for task, (_, labels) in tasks.items() for n in range(len(labels))
        ],
    }
