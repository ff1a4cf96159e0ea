"""The files of an adapter as peft reads them: settings, low-rank factors, and whole modules."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.adapter_files import CONFIG, MODEL_CONFIG, WEIGHTS
from mergesearch.merging.checkpoints.locations import is_hub_name
from mergesearch.merging.export.adapter_format.low_rank import LowRankChange
from mergesearch.merging.export.adapter_format.modules import AdaptedModule

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
#: End of the name of a class -> kind of task, by which peft picks a class of its own.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_TEXT_TO_TEXT = frozenset({"bart", "marian", "mbart", "mt5", "pegasus", "t5", "umt5"})


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter folder holds.

    Attributes:
        changes: Modules with their low-rank changes, each seen as a matrix as it is stored.
        shapes: Name of a module -> shape of its stored matrix.
        whole: Parameter -> its value, of the modules that are stored whole.
        saved: Names of these modules.
        fan_in_fan_out: Whether the model stores matrices as (in, out).
    """

    changes: Mapping[AdaptedModule, LowRankChange]
    shapes: Mapping[str, tuple[int, ...]]
    whole: Mapping[str, torch.Tensor]
    saved: tuple[str, ...]
    fan_in_fan_out: bool


def write_adapter(folder: Path, adapter: Adapter, base: str, config: Mapping[str, Any]) -> None:
    """Write an adapter's settings and tensors.

    Args:
        folder: Exists.
        adapter: What is written.
        base: Path of the model, or its name on the hub with a revision.
        config: Content of the ``config.json`` of the adapted model.
    """
    from safetensors.torch import save_file

    settings = _settings(adapter, base, config)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tensors = {
        f"{_PREFIX}{key}": tensor
        for module, change in adapter.changes.items()
        for key, tensor in _sides(module, change, adapter.shapes[module.name]).items()
    }
    tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in adapter.whole.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    if adapter.saved:  # peft writes none; it has the names of the head's classes
        text = json.dumps(dict(config), indent=2)
        (folder / MODEL_CONFIG).write_text(f"{text}\n", encoding="utf-8")


def _sides(
    module: AdaptedModule, change: LowRankChange, shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """The factors of a change under the names and in the shapes of peft's modules."""
    name = module.name
    if module.kind == "embedding":
        return {
            f"{name}.lora_embedding_A": change.left.T,
            f"{name}.lora_embedding_B": change.right.T,
        }
    up = change.left
    down = change.right
    if module.kind == "transposed":
        up, down = change.right.T, change.left.T
    if module.kind == "convolution":
        down = down.reshape(change.rank, *shape[1:])
        up = up.reshape(*up.shape, *(1 for _ in shape[2:]))
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def _settings(adapter: Adapter, base: str, config: Mapping[str, Any]) -> dict[str, Any]:
    ranks = {module.name: change.rank for module, change in adapter.changes.items()}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    name, _, revision = base.partition("@") if is_hub_name(base) else (base, "", "")
    return {
        "peft_type": "LORA",
        "task_type": task_of(config),
        "base_model_name_or_path": name,
        "revision": revision or None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,  # the factors hold the scale
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(adapter.saved) or None,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def task_of(config: Mapping[str, Any]) -> str | None:
    """The kind of task, by which peft picks a class; None where it has none for a model."""
    architecture = str((config.get("architectures") or [""])[0])
    task = next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)
    if task == "SEQ_2_SEQ_LM" and config.get("model_type") not in _TEXT_TO_TEXT:
        return None  # models that read pictures or sounds
    return task
