"""Where items are, and what the study says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergesearch.merging.foreign.paths import is_folder

#: Shares of search, validation and test items where the user names none.
SHARES = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class ItemFiles:
    """Files or folders of items.

    Attributes:
        paths: Domain -> file or folder; the only key is "" where one path holds all domains.
        split: Column that names the split of an item, or None.
        shares: Shares of search, validation and test items where the files name no splits.
        seed: Seed of that division.
        classes: Domain -> names of its classes in the order of their numbers; "" stands for all
            domains. Empty where the study names none.
        checkpoint: Checkpoint whose image processor and class numbers are used, or None.
        named: Whether classes may be numbered in the order of their names: for evaluators that
            do not depend on the numbers of a model.
    """

    paths: Mapping[str, Path]
    split: str | None = None
    shares: tuple[float, float, float] = SHARES
    seed: int = 0
    classes: Mapping[str, Sequence[str]] | None = None
    checkpoint: str | None = None
    named: bool = False

    def __str__(self) -> str:
        """The paths, for messages."""
        return ", ".join(str(path) for path in self.paths.values())

    @cached_property
    def datasets_folder(self) -> Path | None:
        """The folder, if it is the one of a `datasets` dictionary or there is nothing at all."""
        if list(self.paths) != [""] or self.split is not None:
            return None
        path = self.paths[""]
        return path if is_datasets_folder(path) or not path.exists() else None


def item_files(data: Path | ItemFiles) -> ItemFiles:
    """Items of a bare path."""
    return data if isinstance(data, ItemFiles) else ItemFiles({"": data})


def is_datasets_folder(path: Path) -> bool:
    """Whether ``DatasetDict.save_to_disk`` wrote a folder, or something like it."""
    return is_folder(path) and (
        (path / "dataset_dict.json").is_file()
        or any((child / "state.json").is_file() for child in path.iterdir())
    )
