"""Adapter folders as peft writes them: low-rank changes, whole tensors, and what is refused.

LoRA (Hu 2022, "LoRA: low-rank adaptation of large language models") adds (α/r)·B·A to a matrix;
rsLoRA (Kalajdzievski 2023, "A rank stabilization scaling factor for fine-tuning with LoRA") takes
α/√r. Everything that would change the weights in another way is refused by name, and so is every
setting that is not known here: ignoring one would give other weights than the author's without
anybody noticing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.safetensors_files import (
    PICKLES,
    TensorInfo,
    read_header,
    read_json,
)
from mergesearch.merging.errors import CheckpointError

CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
WEIGHTS = "adapter_model.safetensors"

#: Settings that say how the adapter was trained or loaded, not what it does to weights.
_HARMLESS = frozenset(
    {
        *(
            "auto_mapping",
            "base_model_name_or_path",
            "ensure_weight_tying",
            "inference_mode",
            "megatron_core",
        ),
        *("peft_type", "peft_version", "revision", "task_type", "runtime_config"),
        *(
            "corda_config",
            "eva_config",
            "loftq_config",
            "lora_ga_config",
            "lora_dropout",
            "qalora_group_size",
        ),
        *(
            "exclude_modules",
            "layers_pattern",
            "layers_to_transform",
            "modules_to_save",
            "target_modules",
        ),
    }
)
#: Settings that are read.
_READ = frozenset(
    {
        *(
            "alpha_pattern",
            "bias",
            "fan_in_fan_out",
            "init_lora_weights",
            "lora_alpha",
            "r",
            "rank_pattern",
        ),
        "use_rslora",
    }
)
#: Initialisations that leave the base alone. The others (pissa, olora, corda, loftq) move a part of
#: it into the adapter, which then fits a base that is stored nowhere.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")

_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B|embedding_A|embedding_B)(\.weight)?")
_MERGE_FIRST = "merge it into its base first with peft (merge_and_unload) and save the result"


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
        raise CheckpointError(f"{folder}: expected a PEFT adapter with {CONFIG}, received none")
    settings = read_json(folder / CONFIG)
    _check_settings(folder, settings)
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        hint = (
            "pickle is never read, write it as safetensors with `mergesearch convert FOLDER --out "
            "NEW`"
            if pickles
            else "save it with save_pretrained"
        )
        raise CheckpointError(
            f"{folder}: expected {WEIGHTS}, received {', '.join(pickles) or 'none'}; {hint}"
        )
    sides, whole = _sorted_out(folder, read_header(folder / WEIGHTS))
    return AdapterFiles(
        folder,
        tuple(_low_rank(folder, module, pair, settings) for module, pair in sides.items()),
        whole,
        bool(settings.get("fan_in_fan_out")),
        str(settings.get("base_model_name_or_path") or ""),
        saved=tuple(settings.get("modules_to_save") or ()),
        task=str(settings.get("task_type") or ""),
        model_class=str((settings.get("auto_mapping") or {}).get("base_model_class") or ""),
        config=read_json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).is_file() else {},
    )


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{folder}: expected a PEFT adapter of type LORA, received {kind!r}; {_MERGE_FIRST}"
        )
    for name in sorted(settings):
        if name not in _HARMLESS | _READ and settings[name]:
            raise CheckpointError(
                f"{folder}: expected plain LoRA, received {name}: {_short(settings[name])}; "
                f"{_MERGE_FIRST}"
            )
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{folder}: expected weights that fit the base, received init_lora_weights: {start!r}, "
            "which changes the base; save it with path_initial_model_for_weight_conversion, or "
            f"{_MERGE_FIRST}"
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
            sides.setdefault(match["module"], {})[match["side"]] = info
        elif "lora_" in name or "token_adapter" in name:
            raise CheckpointError(
                f"{folder / WEIGHTS}: expected plain LoRA tensors, received {stored!r}; "
                f"{_MERGE_FIRST}"
            )
        else:
            whole[re.sub(r"\.(modules_to_save|base_layer)(?=\.)", "", name)] = info
    return sides, whole


def _low_rank(
    folder: Path, module: str, sides: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> LowRank:
    embedding = "embedding_A" in sides or "embedding_B" in sides
    wanted = ["embedding_A", "embedding_B"] if embedding else ["A", "B"]
    if sorted(sides) != wanted:
        received = [f"lora_{side}" for side in sorted(sides)]
        raise CheckpointError(
            f"{folder / WEIGHTS}: expected lora_A and lora_B of {module!r}, received {received}"
        )
    down, up = (sides[side] for side in wanted)
    rank = int(_number(folder, settings, module, "rank_pattern", "r"))
    if (
        rank < 1
        or down.shape[:1] != (rank,)
        or up.shape[1:2] != (rank,)
        or math.prod(up.shape[2:]) != 1
    ):
        raise CheckpointError(
            f"{folder / WEIGHTS}: {module!r}: expected rank {rank} as in {CONFIG}, received lora_A "
            f"{list(down.shape)} and lora_B {list(up.shape)}; {_MERGE_FIRST}"
        )
    alpha = _number(folder, settings, module, "alpha_pattern", "lora_alpha")
    return LowRank(
        module,
        down,
        up,
        alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank),
        embedding,
    )


def _number(
    folder: Path, settings: Mapping[str, Any], module: str, patterns: str, key: str
) -> float:
    """A number of a module's adapter, 8 where the settings do not say it, as in peft."""
    value = _by_pattern(settings.get(patterns), module, settings.get(key, 8))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(
            f"{folder / CONFIG}: {key}: expected a number, received {_short(value)}; set the one "
            "that the adapter was trained with"
        )
    return float(value)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name.

    The end begins after a dot, or is the whole name.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str]) -> str:
    """Names in quotes, the first few of them."""
    ordered = sorted(names)
    return ", ".join(map(repr, ordered[:6])) + (
        f" and {len(ordered) - 6} more" if len(ordered) > 6 else ""
    )
