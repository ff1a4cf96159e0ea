"""Makes the data of the digits zoo: four domains, in search, validation and test items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]

#: Domain -> what it does to images ``(n, 8, 8)`` with values in [-1, 1].
DOMAINS: dict[str, Callable[[Images], Images]] = {
    "upright": lambda images: images,
    "rotated": lambda images: np.rot90(images, axes=(1, 2)),
    "mirrored": lambda images: images[:, :, ::-1],
    "inverted": lambda images: -images,
}

#: Grey levels of the scans, 0 to 16.
LEVELS = 16


def load_images() -> tuple[Images, npt.NDArray[np.int64]]:
    """All 1,797 scans as ``(n, 8, 8)`` with values in [-1, 1], and their digits ``(n,)``."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    return (scans.images / LEVELS * 2 - 1).astype(np.float32), scans.target.astype(np.int64)


def in_domain(images: Images, domain: str) -> Images:
    """``images`` as they look in ``domain``, same shape."""
    return np.ascontiguousarray(DOMAINS[domain](images))


def partition(count: int, sizes: Mapping[str, int], seed: int) -> dict[str, Indices]:
    """Disjoint random sets of images: one per name in ``sizes``, and the rest as ``training``.

    Raises:
        ValueError: If nothing is left for training.
    """
    order = np.random.default_rng(seed).permutation(count)
    stops = np.cumsum(list(sizes.values()))
    if stops[-1] >= count:
        raise ValueError(
            f"expected splits of fewer than {count} images in total, received {dict(sizes)}"
        )
    return dict(zip([*sizes, "training"], np.split(order, stops), strict=True))


def save_items(folder: Path, splits: Mapping[str, Indices]) -> None:
    """Write a ``datasets.DatasetDict`` that has every image of a split once in each domain."""
    import datasets

    images, digits = load_images()
    tables = {name: _table(images, digits, chosen) for name, chosen in splits.items()}
    silenced = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        features = _features()
        datasets.DatasetDict(
            {
                name: datasets.Dataset.from_dict(table, features=features)
                for name, table in tables.items()
            }
        ).save_to_disk(str(folder))
    finally:
        if not silenced:
            datasets.enable_progress_bars()


def _table(images: Images, digits: npt.NDArray[np.int64], chosen: Indices) -> dict[str, object]:
    """Columns of one split: all images upright, then all rotated, and so on."""
    return {
        "pixels": np.concatenate([in_domain(images[chosen], domain) for domain in DOMAINS]),
        "label": np.tile(digits[chosen], len(DOMAINS)),
        "domain": [domain for domain in DOMAINS for _ in chosen],
        "id": [f"digit-{index:04d}-{domain}" for domain in DOMAINS for index in chosen],
    }


def _features() -> object:
    from datasets import Array2D, ClassLabel, Features, Value

    return Features(
        {
            "pixels": Array2D((8, 8), "float32"),
            "label": ClassLabel(names=[str(digit) for digit in range(10)]),
            "domain": ClassLabel(names=list(DOMAINS)),
            "id": Value("string"),
        }
    )
