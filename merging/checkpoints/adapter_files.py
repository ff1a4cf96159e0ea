"""Adapter folders as peft writes them: low-rank changes, whole tensors, and what is refused.

LoRA (Hu 2022, "LoRA: low-rank adaptation of large language models") adds (α/r)·B·A to a matrix;
rsLoRA (Kalajdzievski 2023, "A rank stabilization scaling factor for fine-tuning with LoRA") takes
α/√r. What else an adapter may say is refused (:mod:`.adapter_settings`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.adapter_settings import (
    CONFIG,
    MERGE_FIRST,
    AdapterSettings,
    read_settings,
)
from mergesearch.merging.checkpoints.model_config import read_config
from mergesearch.merging.checkpoints.safetensors_files import (
    PICKLES,
    TensorInfo,
    read_header,
)
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.shown import cut, name_shown, path_shown, shown

__all__ = [
    "CONFIG",
    "MODEL_CONFIG",
    "WEIGHTS",
    "AdapterFiles",
    "LowRank",
    "is_adapter",
    "listed",
    "read_adapter",
]

MODEL_CONFIG = "config.json"
WEIGHTS = "adapter_model.safetensors"
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B|embedding_A|embedding_B)(\.weight)?")


@dataclass(frozen=True)
class LowRank:
    """One adapted matrix: the change is ``scale · up · down``, for an embedding its transpose.

    Attributes:
        module: Name of the module in memory.
        down: LoRA's A: ``(r, in)``, ``(r, in, height, width)`` for a convolution.
        up: LoRA's B: ``(out, r)``, ``(out, r, 1, 1)`` for a convolution.
        scale: α/r, or α/√r.
        embedding: Whether the module is an embedding: it stores ``(in, out)``.
    """

    module: str
    down: TensorInfo
    up: TensorInfo
    scale: float
    embedding: bool


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds.

    Attributes:
        folder: Where it lies.
        low_rank: The low-rank changes.
        whole: Tensors that replace the base's, by their names in memory (``modules_to_save``,
            trained biases).
        transposed: Whether the settings say that matrices are stored as (in, out); not reliable
            where a model mixes both, since peft writes what held for the last module.
        base: What the adapter was trained on, as its settings say.
        saved: Modules that were trained whole (``modules_to_save``).
        task: Kind of task, as ``SEQ_CLS``; empty where the settings name none.
        model_class: Class of the adapted model; empty where the settings name none.
        config: Content of the folder's ``config.json``, ``{}`` when there is none; peft writes
            none.
    """

    folder: Path
    low_rank: tuple[LowRank, ...]
    whole: Mapping[str, TensorInfo]
    transposed: bool
    base: str
    saved: tuple[str, ...] = ()
    task: str = ""
    model_class: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the weights depend on."""
        return self.folder / CONFIG, self.folder / WEIGHTS

    def is_saved(self, name: str) -> bool:
        """Whether a tensor is of a module that was trained whole."""
        return any(f".{module}." in f".{name}" for module in self.saved)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors*"))


def read_adapter(folder: Path) -> AdapterFiles:
    """Read the settings and the header of an adapter folder.

    Raises:
        CheckpointError: If it is incomplete or damaged, or changes weights in a way that is not
            supported.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{path_shown(folder)}: expected a PEFT adapter with {CONFIG}, received none"
        )
    settings = read_settings(folder)
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        hint = (
            "pickle is never read, write it as safetensors with `mergesearch convert FOLDER --out "
            "NEW`"
            if pickles
            else "save it with save_pretrained"
        )
        raise CheckpointError(
            f"{path_shown(folder)}: expected {WEIGHTS}, received "
            f"{cut(', '.join(map(name_shown, pickles)) or 'none', 100)}; {hint}"
        )
    sides, whole = _sorted_out(folder, read_header(folder / WEIGHTS))
    return AdapterFiles(
        folder,
        tuple(_low_rank(folder, module, pair, settings) for module, pair in sides.items()),
        whole,
        settings.flag("fan_in_fan_out"),
        settings.text("base_model_name_or_path"),
        saved=settings.texts("modules_to_save"),
        task=settings.text("task_type"),
        model_class=settings.model_class,
        config=read_config(folder),
    )


def _sorted_out(
    folder: Path, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """Low-rank sides by module, and whole tensors by name.

    The sides are ``A`` and ``B``, or ``embedding_A`` and ``embedding_B``.
    """
    sides: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for stored, info in tensors.items():
        name = stored.removeprefix("base_model.model.")
        match = _LOW_RANK.fullmatch(name)
        if match is not None:
            _add(sides.setdefault(match["module"], {}), match["side"], info, stored)
        elif "lora_" in name or "token_adapter" in name:
            raise CheckpointError(
                f"{path_shown(folder / WEIGHTS)}: expected plain LoRA tensors, received "
                f"{shown(stored)}; {MERGE_FIRST}"
            )
        else:
            own = re.sub(r"\.(modules_to_save|base_layer)(?=\.)", "", name)
            _add(whole, own, info, stored)
    return sides, whole


def _add(tensors: dict[str, TensorInfo], name: str, info: TensorInfo, stored: str) -> None:
    """Add a tensor, of which peft stores one."""
    if name in tensors:
        raise CheckpointError(
            f"{path_shown(info.file)}: expected each tensor once, received {shown(stored)} under "
            "two names"
        )
    tensors[name] = info


def _low_rank(
    folder: Path, module: str, sides: Mapping[str, TensorInfo], settings: AdapterSettings
) -> LowRank:
    embedding = "embedding_A" in sides or "embedding_B" in sides
    wanted = ["embedding_A", "embedding_B"] if embedding else ["A", "B"]
    if sorted(sides) != wanted:
        received = [f"lora_{side}" for side in sorted(sides)]
        raise CheckpointError(
            f"{path_shown(folder / WEIGHTS)}: expected lora_A and lora_B of {shown(module)}, "
            f"received {received}"
        )
    down, up = (sides[side] for side in wanted)
    rank = settings.rank(module)
    if (
        rank < 1
        or down.shape[:1] != (rank,)
        or up.shape[1:2] != (rank,)
        or math.prod(up.shape[2:]) != 1
        or len(down.shape) < 2
    ):
        raise CheckpointError(
            f"{path_shown(folder / WEIGHTS)}: {shown(module)}: expected rank {rank:g} as in "
            f"{CONFIG}, received lora_A {_shape(down)} and lora_B {_shape(up)}; {MERGE_FIRST}"
        )
    alpha = settings.alpha(module)
    return LowRank(
        module,
        down,
        up,
        alpha / (math.sqrt(rank) if settings.flag("use_rslora") else rank),
        embedding,
    )


def _shape(info: TensorInfo) -> str:
    return cut(str(list(info.shape)), 40)


def listed(names: Iterable[str]) -> str:
    """Names in quotes, the first few of them."""
    ordered = sorted(names)
    few = [shown(name) for name in ordered[:6]]
    return cut(", ".join(few), 150) + (f" and {len(ordered) - 6} more" if len(ordered) > 6 else "")
