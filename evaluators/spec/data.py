"""Where an evaluator's items are: the key ``data`` of its section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

from pydantic import Field as Key
from pydantic import model_validator

from mergesearch.evaluators.data.item_files import SHARES, ItemFiles, is_datasets_folder
from mergesearch.evaluators.spec.section import Section
from mergesearch.merging.foreign.paths import exists, resolved

DESCRIPTION = (
    "Items: a folder of save_to_disk, a CSV, TSV, JSON-lines or Parquet file, a folder of such "
    "files named after the splits, or of images or recordings in folders of their classes; or a "
    "section."
)


def check_shares(divide: tuple[float, float, float]) -> None:
    """Refuse to leave a split without items.

    Raises:
        ValueError: If a share is not positive.
    """
    if min(divide) <= 0:
        raise ValueError(f"divide: expected three positive shares, received {list(divide)}")


class DataSpec(Section):
    """Items of files, and how they are divided where the files name no splits."""

    file: str | dict[str, str] = Key(
        min_length=1, description="File or folder, or one for each domain."
    )
    split: str | None = Key(
        default=None, description="Column that names the split of an item, if there is one."
    )
    divide: tuple[float, float, float] = Key(
        default=SHARES,
        description="Shares of search, validation and test items where files name no splits; "
        "divided by a hash of the content, alike in every class.",
    )
    seed: int = Key(default=0, ge=0, description="Seed of that division.")
    classes: list[str] | dict[str, list[str]] | None = Key(
        default=None,
        min_length=1,
        description="Names of the classes in the order of the model's numbers, or those of each "
        "domain; by default those of the file or of the checkpoint's config.json.",
    )
    processor: str | None = Key(
        default=None,
        description="Checkpoint whose image processor or feature extractor, and class names are "
        "used; by default the base.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        check_shares(self.divide)
        if isinstance(self.file, dict) and "" in self.file:
            raise ValueError("file: expected names of domains, received an empty one")
        if isinstance(self.classes, dict) and self.domains and sorted(self.classes) != self.domains:
            raise ValueError(
                f"classes: expected a list, or one for each of the domains {self.domains} of file, "
                f"received {sorted(self.classes)}"
            )
        return self

    @property
    def domains(self) -> list[str]:
        """Domains that have a file of their own."""
        return sorted(self.file) if isinstance(self.file, dict) else []


def item_files_of(data: str | DataSpec, folder: Path, *, named: bool = False) -> Path | ItemFiles:
    """The items of a section; relative paths start at ``folder``.

    Args:
        data: What the study says.
        folder: Folder of the study.
        named: Whether classes may be numbered in the order of their names.
    """
    if isinstance(data, str):
        bare = ItemFiles({"": folder / data}, named=named)
        return bare if named else folder / data
    paths: Mapping[str, str] = data.file if isinstance(data.file, dict) else {"": data.file}
    classes = data.classes if isinstance(data.classes, dict | None) else {"": data.classes}
    files = ItemFiles(
        {domain: folder / path for domain, path in paths.items()},
        data.split,
        data.divide,
        data.seed,
        classes,
        data.processor,
    )
    return replace(files, named=named)


def domain_column(data: str | DataSpec, domain: str | None) -> str | None:
    """Column of the domains; where each has a file, one of any name."""
    several = not isinstance(data, str) and data.domains
    return domain or ("domain" if several else None)


def resolve_data(
    data: str | DataSpec, folder: Path, owner: str | None, absolute: Callable[[str], str]
) -> str | DataSpec:
    """The key with absolute paths, and the checkpoint of its processor and classes.

    Args:
        data: What the study says.
        folder: Folder of the study file.
        owner: Path of that checkpoint: the base, or the expert whose head scores the items.
        absolute: Makes paths of checkpoints absolute.
    """
    if isinstance(data, str):
        path = resolved(folder / data)
        if is_datasets_folder(path) or not exists(path):
            return str(path)
        return DataSpec(file=str(path), processor=owner)
    located = (
        {domain: str(resolved(folder / path)) for domain, path in data.file.items()}
        if isinstance(data.file, dict)
        else str(resolved(folder / data.file))
    )
    processor = owner if data.processor is None else absolute(data.processor)
    return data.model_copy(update={"file": located, "processor": processor})
