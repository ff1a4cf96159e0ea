"""The calibration option of operators: its form in recipes, its defaults, and its folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    with_config,
)
from typing_extensions import TypedDict  # pydantic refuses that of `typing` before Python 3.12

from mergesearch.merging.checkpoints.locations import absolute_path
from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.datasets_folder import INFO, features_of
from mergesearch.merging.foreign.file_kinds import kind_of
from mergesearch.merging.foreign.paths import expanded, is_file
from mergesearch.merging.foreign.shown import path_shown, shown, shown_names
from mergesearch.merging.models.calibration_prompts import refuse_prompts
from mergesearch.merging.tensors.layout import Layout

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.models.task_heads import TaskHead
    from mergesearch.merging.tensors.source import Options

#: A list of texts for all tasks, or one for each.
TextsByTask = list[str] | dict[str, list[str]]


@with_config(ConfigDict(extra="forbid"))
class CalibrationSpec(TypedDict):
    """A model and items on disk; keys that are left out take the values of :data:`DEFAULTS`.

    Those that have none there stay out, so that recipes without them are the same as ever.
    """

    data: Annotated[
        str | dict[str, str],
        Field(description="Folder of DatasetDict.save_to_disk, or one per expert."),
    ]
    model_class: Annotated[str, Field(description="transformers auto class that loads the base.")]
    inputs: Annotated[
        dict[str, str], Field(min_length=1, description="Argument of the model -> column.")
    ]
    label: NotRequired[
        Annotated[str | None, Field(description="Column of class numbers, where they are used.")]
    ]
    split: NotRequired[Annotated[str, Field(description="Split of the folder.")]]
    samples: NotRequired[Annotated[int, Field(ge=1, description="Items per expert, at most.")]]
    batch_size: NotRequired[Annotated[int, Field(ge=1, description="Items per forward pass.")]]
    seed: NotRequired[Annotated[int, Field(ge=0, description="Chooses the items.")]]
    device: NotRequired[Annotated[str, Field(description="Where the model runs.")]]
    domain: NotRequired[
        Annotated[
            str,
            Field(description="Column of domains; an expert gets the items of that of its name."),
        ]
    ]
    prompts: NotRequired[
        Annotated[
            TextsByTask,
            Field(
                min_length=1,
                description="Class prompts of CLIP and its kin, with {} for the name of a class, "
                "for all experts or for each.",
            ),
        ]
    ]
    classes: NotRequired[
        Annotated[
            TextsByTask,
            Field(
                min_length=1,
                description="Names of the classes, for all experts or for each; by default those "
                "of the label column.",
            ),
        ]
    ]
    tokenizer: NotRequired[
        Annotated[
            str, Field(description="Folder of the tokenizer of prompts; by default the base's.")
        ]
    ]


DEFAULTS: Mapping[str, Any] = {
    "label": None,
    "split": "train",
    "samples": 256,
    "batch_size": 32,
    "seed": 0,
    "device": "cpu",
}


@dataclass(frozen=True, eq=False)
class Calibration:
    """A model and batches in memory.

    Attributes:
        model: Its ``state_dict`` has the names of the merged tensors. It is copied, never changed.
        batches: Keyword arguments of the model, batch by batch; for all experts, or by the name of
            the expert.
        label: The entry of each batch that holds class numbers ``(items,)`` and is not given to the
            model, if any.
        head: What answers by the model, with the expert's name as the task: class prompts
            (:class:`mergesearch.merging.models.prompt_heads.PromptHeads`); None: the model itself.
    """

    model: nn.Module
    batches: (
        Sequence[Mapping[str, torch.Tensor]] | Mapping[str, Sequence[Mapping[str, torch.Tensor]]]
    )
    label: str | None = None
    head: TaskHead | None = None


def _or_object(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, Calibration) else handler(value)


def _complete(value: Any) -> Any:
    return value if isinstance(value, Calibration) else {**DEFAULTS, **value}


if TYPE_CHECKING:
    CalibrationOption = CalibrationSpec | Calibration
else:
    # The object is for Python callers only, so the schema of recipes does not show it.
    CalibrationOption = Annotated[
        CalibrationSpec, WrapValidator(_or_object), AfterValidator(_complete)
    ]


#: For operators that run every expert on items.
ExpertItems = Annotated[
    CalibrationOption,
    Field(description="Items to run the experts on, and the model that runs them."),
]


def refuse_calibration(_layout: Layout, _experts: int, options: Options) -> str | None:
    """What is wrong with the folders of ``options["calibration"]``, or None.

    Known from their descriptions alone.
    """
    calibration = options["calibration"]
    if isinstance(calibration, Calibration):
        return None
    columns = {*calibration["inputs"].values(), calibration["label"], calibration.get("domain")}
    columns -= {None}
    folders = [expanded(folder) for folder in _by_expert(calibration["data"]).values()]
    reasons = (_refuse_folder(folder, calibration["split"], columns) for folder in folders)
    refused = next((reason for reason in reasons if reason is not None), None)
    return refuse_prompts(calibration) if refused is None else f"calibration.data: {refused}"


def _refuse_folder(data: Path, split: str, columns: set[str]) -> str | None:
    if data.is_file():
        return (
            f"expected a folder written by save_to_disk, received {kind_of(data)}, {data}; load "
            "it with datasets and save it"
        )
    if not data.is_dir():
        return f"expected a folder written by save_to_disk, found no {data}"
    if not (data / split / "state.json").is_file():
        known = sorted(path.name for path in data.iterdir() if (path / "state.json").is_file())
        return (
            f"{path_shown(data)}: expected a split {shown(split)}, received {shown_names(known)}; "
            "set calibration.split"
        )
    try:
        features = features_of(data / split)
    except InputError as error:
        return f"{error}; write the folder again by save_to_disk"
    if not is_file(data / split / INFO):
        return (
            f"{path_shown(data / split)}: expected a readable dataset_info.json, as save_to_disk "
            "writes it; write it again"
        )
    missing = sorted(columns - set(features))
    return (
        f"{path_shown(data / split)}: expected a column {shown(missing[0])}, received only "
        f"{shown_names(features)}"
        if missing
        else None
    )


def absolute(options: Options, folder: Path) -> dict[str, Any]:
    """The hyperparameters with the folders of items and of a tokenizer made absolute.

    Relative ones start at ``folder``.
    """
    calibration = options.get("calibration")
    if not isinstance(calibration, dict) or "data" not in calibration:
        return dict(options)
    data = calibration["data"]
    paths = {
        key: os.path.abspath(folder / expanded(path)) for key, path in _by_expert(data).items()
    }
    located = {**calibration, "data": paths if isinstance(data, dict) else paths[""]}
    if isinstance(calibration.get("tokenizer"), str):
        located["tokenizer"] = absolute_path(calibration["tokenizer"], folder)
    return {**options, "calibration": located}


def file_versions(options: Options) -> list[list[Any]]:
    """Path, size and time of every file of the items, to tell whether they changed since.

    Empty without items on disk.
    """
    calibration = options.get("calibration")
    if not isinstance(calibration, dict):
        return []
    folders = sorted(
        expanded(path) / calibration["split"] for path in _by_expert(calibration["data"]).values()
    )
    files = [
        file
        for folder in dict.fromkeys(folders)
        for file in sorted(folder.glob("*"))
        if file.is_file()
    ]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _by_expert(data: str | Mapping[str, str]) -> Mapping[str, str]:
    return {"": data} if isinstance(data, str) else data
