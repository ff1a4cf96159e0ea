"""Batches of calibration items: read from a folder of ``datasets``, or taken from memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.datasets_folder import read_split
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.paths import expanded
from mergesearch.merging.foreign.shown import path_shown, shown, shown_names
from mergesearch.merging.models.calibration_experts import lacking_domain
from mergesearch.merging.models.calibration_spec import CalibrationSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Items:
    """A batch of calibration items.

    Attributes:
        inputs: Keyword arguments of the model, each ``(items, ...)``.
        labels: Class numbers ``(items,)``, or None.
        task: The task of all of them, for heads of class prompts.
    """

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor | None = None
    task: str = ""

    def one_by_one(self) -> Iterator[Items]:
        """The same items as batches of one."""
        count = len(next(iter(self.inputs.values())))
        for index in range(count):
            part = slice(index, index + 1)
            labels = None if self.labels is None else self.labels[part]
            inputs = {name: tensor[part] for name, tensor in self.inputs.items()}
            yield Items(inputs, labels, self.task)


def read_items(spec: CalibrationSpec, folder: str, domain: str = "") -> list[Items]:
    """The first ``samples`` items of a folder, in the order that the seed gives, in batches.

    Args:
        spec: The complete option.
        folder: Where the items are.
        domain: Name of the domain whose items are meant, where the option names their column.

    Raises:
        InputError: If there are none, or they cannot be stacked.
    """
    import numpy as np
    from datasets import load_from_disk

    label = spec["label"]
    columns = {*spec["inputs"].values(), *([] if label is None else [label])}
    path = expanded(folder) / spec["split"]
    read = sorted({*columns, *([spec["domain"]] if "domain" in spec else [])})
    _check_columns(path, read)
    with library_errors(f"calibration.data: {path_shown(path)}", "a folder of save_to_disk"):
        dataset = load_from_disk(str(path))
    if "domain" in spec:
        dataset = _of_domain(dataset, spec["domain"], domain, path)
    dataset = dataset.with_format("numpy", columns=sorted(columns))
    chosen = np.random.default_rng(spec["seed"]).permutation(len(dataset))[: spec["samples"]]
    if not len(chosen):
        raise InputError(
            f"calibration.data: {path_shown(path)}: expected items, received an empty split"
        )
    with library_errors(f"calibration.data: {path_shown(path)}", "items that can be read"):
        values = dataset[chosen.tolist()]
    inputs = {
        name: _as_input(name, values[column], path) for name, column in spec["inputs"].items()
    }
    labels = None if label is None else _as_input("label", values[label], path)
    return [
        Items(
            {name: tensor[start : start + spec["batch_size"]] for name, tensor in inputs.items()},
            None if labels is None else labels[start : start + spec["batch_size"]],
        )
        for start in range(0, len(chosen), spec["batch_size"])
    ]


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    """Refuse damaged files, by which datasets may end the process, and missing columns.

    Raises:
        InputError: In one line.
    """
    table = read_split(path, full=False)
    lacking = next((column for column in columns if column not in table.column_names), None)
    if lacking is not None:
        raise InputError(
            f"calibration.data: {path_shown(path)}: expected a column {shown(lacking)}, received "
            f"only {shown_names(table.column_names)}"
        )
    with library_errors(f"calibration.data: {path_shown(path)}", "whole Arrow files"):
        table.select(columns).validate(full=True)


def _of_domain(dataset: Any, column: str, domain: str, path: Path) -> Any:
    """The items of a domain, which numbers or names in a column say.

    Raises:
        InputError: If there are none.
    """
    feature = dataset.features[column]
    names = [str(name) for name in dataset[column]]
    if hasattr(feature, "int2str"):
        with library_errors(f"calibration.data: {path_shown(path)}", "numbers of domains"):
            names = [feature.int2str(int(name)) for name in names]
    rows = [row for row, name in enumerate(names) if name == domain]
    if not rows:
        raise lacking_domain(path, domain, sorted(set(names)))
    return dataset.select(rows)


def _as_input(name: str, values: Any, path: Path) -> torch.Tensor:
    import numpy as np
    import torch

    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"calibration.inputs.{name}: {path_shown(path)}: expected arrays of numbers of one "
            f"shape, received {array.dtype}; pad or crop the items"
        )
    if name != "pixel_values" and array.dtype.kind != "f":
        return torch.from_numpy(array.astype(np.int64))
    pixels = torch.from_numpy(array.astype(np.float32))
    # (items, height, width): the channel axis is implied
    return pixels[:, None] if name == "pixel_values" and pixels.ndim == 3 else pixels


def items_of(batch: Mapping[str, torch.Tensor], label: str | None) -> Items:
    """The batch of keyword arguments, with the entry ``label`` as class numbers.

    Raises:
        InputError: If it is no mapping, or has no such entry.
    """
    if not isinstance(batch, Mapping) or (label is not None and label not in batch):
        wanted = (
            "keyword arguments of the model"
            if label is None
            else f"keyword arguments of the model and {label!r}"
        )
        raise InputError(
            f"calibration: expected batches of {wanted}, received {type(batch).__name__}"
        )
    inputs = {name: tensor for name, tensor in batch.items() if name != label}
    return Items(inputs, None if label is None else batch[label])


def items_digest(batches: Sequence[Items]) -> str:
    """SHA-256 over names, dtypes, shapes and numbers of all batches."""
    digest = hashlib.sha256()
    for items in batches:
        tensors = dict(items.inputs) if items.labels is None else {**items.inputs, "": items.labels}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
