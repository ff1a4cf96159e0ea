"""Models loaded from checkpoints, without code from the folder and without pickle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import nn

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.models.parameter_views import parameter_views


def load_model(source_path: str, model_class: str) -> nn.Module:
    """The model of a checkpoint folder in evaluation mode, in its stored dtype.

    Where there are several dtypes, it is the widest.

    Never runs code from the folder and never reads pickles.

    Args:
        source_path: Folder, ``org/name@revision`` or ``MODEL+ADAPTER``, as for
            :meth:`Checkpoint.open`.
        model_class: A ``transformers`` auto class, for example ``AutoModelForImageClassification``.

    Raises:
        InputError: If there is no such auto class.
        CheckpointError: If the folder has no configuration, or lacks weights of the model (they
            would be random).
    """
    auto = _auto_class(model_class)
    checkpoint = open_checkpoint(source_path)
    if checkpoint.folder is None or not checkpoint.config:
        raise CheckpointError(
            f"{source_path}: expected a folder with config.json, received none; add the model's own"
        )
    dtype = widest_dtype(dtype for _, dtype in checkpoint.merged.values())
    with no_progress_bar():
        model, report = auto.from_pretrained(
            str(checkpoint.folder),
            dtype=dtype,
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
