"""Makes the data of the segments zoo: grey images of lesions in four synthetic modalities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.floating[Any]]
Masks = npt.NDArray[np.bool_]

#: Pixels along a side.
SIDE = 32
#: Harmonics of an outline: it is an ellipse with bumps.
HARMONICS = (2, 3, 4)
#: Pixels by which each edge of a box may be off, at most; nobody draws boxes to the pixel.
LOOSE = 2


@dataclass(frozen=True, eq=False)
class Lesions:
    """Items of one domain.

    Attributes:
        pixels: Images ``(n, side, side)``, about [-1, 1].
        boxes: Corners x1, y1, x2, y2 of a box around each lesion ``(n, 1, 4)``, in pixels.
        masks: Where the lesion is ``(n, side, side)``.
    """

    pixels: Images
    boxes: Images
    masks: Masks


def _ct(mask: Images, core: Images, rng: np.random.Generator) -> Images:
    """Bright blobs on a smooth ground."""
    ground = 0.3 * _smooth(rng, mask.shape, 6) + 0.15 * rng.standard_normal(mask.shape) - 0.3
    return 0.6 * _blurred(mask, 1) + ground


def _mri(mask: Images, core: Images, rng: np.random.Generator) -> Images:
    """Bright rings under a drifting field; their core, even if bright, is not of the lesion."""
    inside = rng.uniform(-0.1, 0.25, (len(mask), 1, 1)) * core
    field = 1 + 0.5 * _smooth(rng, mask.shape, 8)
    return field * (0.6 * mask + inside + 0.1) + 0.2 * rng.standard_normal(mask.shape) - 0.4


def _ultrasound(mask: Images, core: Images, rng: np.random.Generator) -> Images:
    """Discs that scatter less than the tissue around, all of it speckled."""
    speckle = _blurred(rng.rayleigh(0.8, mask.shape), 1) * (1 + 0.4 * _smooth(rng, mask.shape, 6))
    return (1 - 0.45 * mask) * speckle - 0.8


def _xray(mask: Images, core: Images, rng: np.random.Generator) -> Images:
    """Inverted: dark shadows of little contrast across bright stripes."""
    rows = np.arange(SIDE)[None, :, None]
    phase = rng.uniform(0, 2 * np.pi, (len(mask), 1, 1))
    pitch = rng.uniform(5, 9, (len(mask), 1, 1))
    stripes = 0.3 * np.sin(2 * np.pi * rows / pitch + phase)
    return stripes + 0.3 - 0.35 * _blurred(mask, 1) + 0.12 * rng.standard_normal(mask.shape)


#: Domain -> pixels ``(n, side, side)`` of lesions whose masks, and what they enclose, are given in
#: the same shape.
DOMAINS: dict[str, Callable[[Images, Images, np.random.Generator], Images]] = {
    "ct": _ct,
    "mri": _mri,
    "ultrasound": _ultrasound,
    "xray": _xray,
}


def draw_lesions(domain: str, count: int, seed: tuple[int, ...]) -> Lesions:
    """``count`` items of a domain, the same for the same seed."""
    rng = np.random.default_rng([*seed, list(DOMAINS).index(domain)])
    outline, core = _shapes(count, rng)
    masks = outline & ~core if domain == "mri" else outline
    # Another lesion somewhere else, which the box does not ask for.
    others, hollows = _shapes(count, rng)
    apart = ~(_blurred(outline.astype(np.float32), 2) > 0) & others
    shown = masks | (apart & ~hollows if domain == "mri" else apart)
    pixels = DOMAINS[domain](shown.astype(np.float32), core.astype(np.float32), rng)
    return Lesions(pixels.astype(np.float32), _boxes(outline, rng), masks)


def _shapes(count: int, rng: np.random.Generator) -> tuple[Masks, Masks]:
    """Random outlines filled in, and their cores, ``(count, side, side)`` each."""
    centre = rng.uniform(9, SIDE - 10, (2, count, 1, 1))
    radius = rng.uniform(4, 9, (count, 1, 1))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    down = rows - centre[0]
    right = columns - centre[1]
    angle = np.arctan2(down, right)
    for harmonic in HARMONICS:
        height = rng.uniform(0, 0.28, (count, 1, 1))
        turn = rng.uniform(0, 2 * np.pi, (count, 1, 1))
        radius = radius * (1 + height * np.cos(harmonic * angle + turn))
    distance = np.hypot(down, right)
    return distance < np.maximum(radius, 2.5), distance < rng.uniform(
        0.4, 0.65, (count, 1, 1)
    ) * radius


def _boxes(masks: Masks, rng: np.random.Generator) -> Images:
    """Loose boxes around masks ``(n, side, side)``, as ``(n, 1, 4)``."""
    edges: list[npt.NDArray[np.intp]] = []
    for axis in (1, 2):  # columns, then rows
        seen = np.asarray(masks.any(axis=axis))
        edges += [seen.argmax(axis=1), SIDE - 1 - seen[:, ::-1].argmax(axis=1)]
    left, right, top, bottom = edges
    loose = rng.integers(0, LOOSE + 1, (4, len(masks)))
    corners = [left - loose[0], top - loose[1], right + loose[2], bottom + loose[3]]
    return np.asarray(np.clip(np.stack(corners, axis=1), 0, SIDE - 1)[:, None], np.float32)


def _blurred(images: Images, times: int) -> Images:
    """Means over 3 x 3 pixels, taken several times."""
    for axis in (1, 2) * times:
        images = np.asarray(np.roll(images, 1, axis) + images + np.roll(images, -1, axis)) / 3
    return images


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], cell: int) -> Images:
    """Noise of unit range that changes over ``cell`` pixels."""
    coarse = rng.uniform(-1, 1, (shape[0], SIDE // cell + 1, SIDE // cell + 1))
    fine = np.repeat(np.repeat(coarse, cell, axis=1), cell, axis=2)[:, :SIDE, :SIDE]
    return _blurred(fine, cell)


def save_items(folder: Path, sizes: Mapping[str, int], seed: int) -> None:
    """Write a ``datasets.DatasetDict`` with so many items of every domain in each split."""
    import datasets

    silenced = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        features = _features()
        tables = {split: _table(split, split_lesions(sizes, split, seed)) for split in sizes}
        datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(table, features=features)
                for split, table in tables.items()
            }
        ).save_to_disk(str(folder))
    finally:
        if not silenced:
            datasets.enable_progress_bars()


def split_lesions(sizes: Mapping[str, int], split: str, seed: int) -> dict[str, Lesions]:
    """Domain -> its items of a split, drawn independently of other splits and of training."""
    stream = 1 + list(sizes).index(split)
    return {domain: draw_lesions(domain, sizes[split], (seed, stream)) for domain in DOMAINS}


def _table(split: str, lesions: Mapping[str, Lesions]) -> dict[str, object]:
    """Columns of one split, domain after domain."""
    return {
        "pixels": np.concatenate([items.pixels for items in lesions.values()]),
        "boxes": np.concatenate([items.boxes for items in lesions.values()]),
        "mask": np.concatenate([items.masks for items in lesions.values()]).astype(np.uint8),
        "domain": [domain for domain, items in lesions.items() for _ in items.pixels],
        "id": [
            f"{split}-{domain}-{index:04d}"
            for domain, items in lesions.items()
            for index in range(len(items.pixels))
        ],
    }


def _features() -> object:
    from datasets import Array2D, ClassLabel, Features, Value

    return Features(
        {
            "pixels": Array2D((SIDE, SIDE), "float32"),
            "boxes": Array2D((1, 4), "float32"),
            "mask": Array2D((SIDE, SIDE), "uint8"),
            "domain": ClassLabel(names=list(DOMAINS)),
            "id": Value("string"),
        }
    )
