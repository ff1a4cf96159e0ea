"""Heads that an adapter stores whole: the class of model that they make, and its classes.

Peft saves the modules of ``modules_to_save`` beside the low-rank factors, but no configuration of
the model that it adapted. Its architecture follows from the task of the adapter, and the number of
classes from the shapes of the head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mergesearch.merging.checkpoints.adapter_files import AdapterFiles, listed
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.checkpoints.skeleton import InMemory, Skeleton
from mergesearch.merging.checkpoints.tied import is_vocabulary_head
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.shown import path_shown
from mergesearch.merging.tensors.layout import FLOATING
from mergesearch.merging.tensors.roles import classify

#: What of a configuration belongs to a head.
HEAD_SETTINGS = ("architectures", "id2label", "label2id", "num_labels", "problem_type")
#: Task of an adapter -> name of transformers' table of the classes that do it.
_CLASSES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


@dataclass(frozen=True, eq=False)
class HeadedModel:
    """The model that an adapter was trained on: its base with another head.

    Attributes:
        config: Its configuration.
        skeleton: The model without weights; None if transformers cannot build it.
        dropped: Tensors of the stored model that this class does not have.
        stored_as: Name of a stored tensor -> what a checkpoint of this class calls it, where that
            is another.
    """

    config: Mapping[str, Any]
    skeleton: Skeleton | None = None
    dropped: frozenset[str] = frozenset()
    stored_as: Mapping[str, str] = field(default_factory=dict)


def saved_heads(model: Checkpoint, adapter: AdapterFiles) -> dict[str, TensorInfo]:
    """Tensors of an adapter's saved modules that its model stores in another shape, or not at all.

    Embeddings, blocks and output heads over the vocabulary are none.
    """
    return {
        name: info
        for name, info in adapter.whole.items()
        if adapter.is_saved(name) and not _has(model, name, info) and _may_be_head(name)
    }


def with_saved_heads(
    model: Checkpoint, adapter: AdapterFiles, heads: Mapping[str, TensorInfo]
) -> HeadedModel:
    """The model with the heads of an adapter in the place of its own.

    Args:
        model: Below the adapter.
        adapter: Its files.
        heads: As :func:`saved_heads` finds them.

    Raises:
        CheckpointError: If a weight of the model is stored nowhere: it was random in training.
    """
    configs = [_config(model, adapter, count) for count in _label_counts(adapter, heads)]
    for config in configs:
        skeleton = _skeleton(json.dumps(config, sort_keys=True))
        if skeleton is not None and _fits(skeleton, heads):
            return _described(model, adapter, config, skeleton)
    return HeadedModel(configs[0])


def relabelled(model: Checkpoint, adapter: AdapterFiles) -> Mapping[str, Any]:
    """The configuration of the model with what the adapter's folder says of a head of its shape."""
    if not any(adapter.is_saved(name) for name in adapter.whole):
        return model.config
    return _stated(model.config, adapter)


def _has(model: Checkpoint, name: str, info: TensorInfo) -> bool:
    return name in model.tensors and model.tensors[name].shape == info.shape


def _may_be_head(name: str) -> bool:
    role = classify(name)
    return role.block is None and role.module != "embedding" and not is_vocabulary_head(name)


def _label_counts(adapter: AdapterFiles, heads: Mapping[str, TensorInfo]) -> list[int | None]:
    """Numbers of classes that the shapes allow, the likeliest first; None for the stated one."""
    if "id2label" in adapter.config:
        return [None]
    whole = [info for info in heads.values() if info.stop > info.start]  # empty ones have any shape
    matrices = {info.shape[0] for info in whole if len(info.shape) > 1}
    return [*sorted(matrices or {info.shape[0] for info in whole if info.shape})] or [None]


def _config(model: Checkpoint, adapter: AdapterFiles, count: int | None) -> dict[str, Any]:
    """The configuration of the model with so many classes; unnamed ones if the number is new."""
    config = dict(model.config)
    name = adapter.model_class or _class_of_task(adapter.task, config.get("model_type"))
    if name is not None:
        config["architectures"] = [name]
    if count is not None and count != len(config.get("id2label") or ()):
        labels = {str(number): f"LABEL_{number}" for number in range(count)}
        config |= {"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
        config.pop("num_labels", None)
    return _stated(config, adapter)


def _stated(config: Mapping[str, Any], adapter: AdapterFiles) -> dict[str, Any]:
    """A configuration with what the adapter's folder says of its head."""
    stated = {key: adapter.config[key] for key in HEAD_SETTINGS if key in adapter.config}
    return {**config, **stated}


def _class_of_task(task: str, model_type: str | None) -> str | None:
    """Name of transformers' class of a kind of model for a task."""
    if task not in _CLASSES:
        return None
    from transformers.models.auto import modeling_auto

    name = getattr(modeling_auto, _CLASSES[task], {}).get(model_type)
    return str(name) if isinstance(name, str) else None


@lru_cache(maxsize=4)
def _skeleton(config: str) -> Skeleton | None:
    """The model of a configuration, which several adapters of a study share."""
    return Skeleton.of(json.loads(config))


def _fits(skeleton: Skeleton, heads: Mapping[str, TensorInfo]) -> bool:
    state = skeleton.model.state_dict()
    in_memory = skeleton.names_in_memory(heads)
    names = {name: in_memory[name].name for name in heads}
    return all(
        own in state and tuple(state[own].shape) == heads[name].shape for name, own in names.items()
    )


def _described(
    model: Checkpoint, adapter: AdapterFiles, config: Mapping[str, Any], skeleton: Skeleton
) -> HeadedModel:
    in_memory = skeleton.names_in_memory([*model.tensors, *adapter.whole])
    state = skeleton.model.state_dict()
    _check_whole(model, adapter, skeleton, in_memory)
    dropped = frozenset(
        name
        for name, info in model.tensors.items()
        if info.dtype in FLOATING and in_memory[name].name not in state
    )
    prefix = f"{skeleton.model.base_model_prefix}."
    bare = not any(name.startswith(prefix) for name in model.tensors)
    stored_as = {
        name: prefix + name
        for name in model.tensors
        if bare and in_memory[name].name.startswith(prefix) and name not in dropped
    }
    return HeadedModel(config, skeleton, dropped, stored_as)


def _check_whole(
    model: Checkpoint,
    adapter: AdapterFiles,
    skeleton: Skeleton,
    in_memory: Mapping[str, InMemory],
) -> None:
    """Refuse weights that neither model nor adapter stores."""
    stored = {one.name for one in in_memory.values()}
    lost = [name for name, _ in skeleton.model.named_parameters() if name not in stored]
    if lost:
        raise CheckpointError(
            f"{path_shown(adapter.folder)}: expected every weight of "
            f"{type(skeleton.model).__name__} in the adapter or in {path_shown(model.path)}, "
            f"received none of {listed(lost)}; they were random when the adapter was trained: add "
            "their modules to modules_to_save and train it again"
        )
