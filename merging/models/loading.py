"""Models loaded from checkpoints, without code from the folder and without pickle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import nn

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.extensions.references import is_reference, known
from mergesearch.merging.models.parameter_views import parameter_views


def load_model(source_path: str, model_class: str, dtype: str | None = None) -> nn.Module:
    """The model of a checkpoint folder in evaluation mode, in its stored dtype.

    Where there are several dtypes, it is the widest.

    Never runs code from the folder and never reads pickles.

    Args:
        source_path: Folder, ``org/name@revision`` or ``MODEL+ADAPTER``, as for
            :meth:`Checkpoint.open`; a single file only for a function.
        model_class: A ``transformers`` auto class, for example ``AutoModelForImageClassification``,
            or ``module:name`` of a function that builds any module, which this process knows.
        dtype: Of the model of an auto class, instead of the stored one.

    Raises:
        InputError: If there is no such auto class.
        CheckpointError: If the folder has no configuration, or lacks weights of the model (they
            would be random).
    """
    if is_reference(model_class):
        return _built_model(source_path, model_class)
    auto = _auto_class(model_class)
    checkpoint = open_checkpoint(source_path)
    if checkpoint.folder is None or not checkpoint.config:
        raise CheckpointError(
            f"{source_path}: expected a folder with config.json, received none; add the model's own"
        )
    if "_class_name" in checkpoint.config and "model_type" not in checkpoint.config:
        raise CheckpointError(
            f"{source_path}: expected a model of transformers, received "
            f"{checkpoint.config['_class_name']} of diffusers; name a function that builds it "
            "(model_class: module:name)"
        )
    kept = widest_dtype([dtype] if dtype else (own for _, own in checkpoint.merged.values()))
    with no_progress_bar():
        model, report = auto.from_pretrained(
            str(checkpoint.folder),
            dtype=kept,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source_path}: expected every weight of {type(model).__name__}, missing {missing}; "
            "choose the auto class that the checkpoint was trained with"
        )
    if isinstance(checkpoint, AdaptedCheckpoint):
        _apply_adapter(checkpoint, model)
    loaded: nn.Module = model.eval()
    return loaded


def check_builder(source_path: str, builder: str) -> None:
    """Refuse a function that builds another module than a checkpoint holds, from its headers.

    One that this process does not know is let pass, and so is one that cannot build without memory.

    Raises:
        InputError: If it builds no module.
        CheckpointError: If the module has other tensors.
    """
    build = known(builder)
    if build is None:
        return
    try:
        with torch.device("meta"):
            model: Any = build()
    except Exception:  # whatever a function does that "meta" cannot: loading tells then
        return
    _check_module(model, open_checkpoint(source_path), builder)


def _built_model(source_path: str, builder: str) -> nn.Module:
    """A module that a function builds, with the weights of a checkpoint.

    Raises:
        InputError: If this process does not know the function, or it builds no module.
        CheckpointError: If the checkpoint lacks weights of the module, or has others.
    """
    build = known(builder)
    if build is None:
        raise InputError(
            f"model class: expected a function that an evaluator of the study names, received "
            f"{builder!r}"
        )
    checkpoint = open_checkpoint(source_path)
    model = _check_module(build(), checkpoint, builder)
    model.to(widest_dtype(dtype for _, dtype in checkpoint.merged.values()))
    model.load_state_dict({name: checkpoint.read(name) for name in model.state_dict()})
    return model.eval()


def _check_module(model: Any, checkpoint: Checkpoint, builder: str) -> nn.Module:
    """The module, once its tensors are known to be those of the checkpoint.

    Raises:
        InputError: If it is no module.
        CheckpointError: If it has other tensors.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model class: expected {builder} to build a torch module, received "
            f"{type(model).__name__}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: info.shape for name, info in checkpoint.tensors.items()}
    for name in sorted({*shapes, *stored}):
        if shapes.get(name) != stored.get(name):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r}: expected shape "
                f"{shapes.get(name, 'none: the module has no such tensor')} as {builder} builds "
                f"{type(model).__name__}, received {stored.get(name, 'none')}"
            )
    return model


def _auto_class(model_class: str) -> Any:
    import transformers

    auto = getattr(transformers, model_class, None)
    if not model_class.startswith("AutoModel") or not hasattr(auto, "from_pretrained"):
        raise InputError(
            "model class: expected a transformers auto class (AutoModel...), received "
            f"{model_class!r}"
        )
    return auto


def _apply_adapter(checkpoint: AdaptedCheckpoint, model: nn.Module) -> None:
    views = parameter_views(model)
    state = model.state_dict()
    for name in checkpoint.adapted:
        if name not in views:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r}: expected a parameter of "
                f"{type(model).__name__}, found none; choose the auto class that the adapter was "
                "trained with"
            )
        views[name].of(state[views[name].parameter]).copy_(checkpoint.read(name))


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """A context without the bar that transformers draws for every load.

    Workers would interleave theirs with the study's.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def widest_dtype(names: Iterable[str]) -> torch.dtype:
    """The torch dtype that holds all dtypes of these names."""
    dtypes: list[torch.dtype] = [getattr(torch, name) for name in sorted(set(names))]
    return reduce(torch.promote_types, dtypes)
