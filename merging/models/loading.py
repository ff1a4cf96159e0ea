"""Models loaded from checkpoints, without code from the folder and without pickle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from inspect import signature
from typing import Any

import torch
from torch import nn

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.extensions.references import is_reference, known
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.shown import path_shown, shown, shown_names
from mergesearch.merging.models.model_classes import (
    auto_class,
    diffusers_class,
    is_of_diffusers,
    loads_as,
)
from mergesearch.merging.models.parameter_views import parameter_views


def load_model(source_path: str, model_class: str, dtype: str | None = None) -> nn.Module:
    """The model of a checkpoint folder in evaluation mode, in its stored dtype.

    Where there are several dtypes, it is the widest.

    Never runs code from the folder and never reads pickles.

    Args:
        source_path: Folder, ``org/name@revision`` or ``MODEL+ADAPTER``, as for
            :meth:`Checkpoint.open`; a single file only for a function.
        model_class: A ``transformers`` auto class, for example ``AutoModelForImageClassification``,
            or ``module:name`` of a function that builds any module, which this process knows. For a
            folder of diffusers it is the class that the folder names instead.
        dtype: Of the model of an auto class, instead of the stored one.

    Raises:
        InputError: If there is no such auto class.
        CheckpointError: If the folder has no configuration, or lacks weights of the model (they
            would be random).
    """
    if is_reference(model_class):
        return _built_model(source_path, model_class)
    checkpoint = open_checkpoint(source_path)
    if checkpoint.folder is None or not checkpoint.config:
        raise CheckpointError(
            f"{source_path}: expected a folder with config.json, received none; add the model's own"
        )
    if is_of_diffusers(checkpoint.config):
        return _diffusers_model(checkpoint, dtype)
    auto = auto_class(model_class)
    kept = widest_dtype([dtype] if dtype else (own for _, own in checkpoint.merged.values()))
    adapted = checkpoint if isinstance(checkpoint, AdaptedCheckpoint) else None
    # What transformers would report as missing, an adapter brings.
    quiet = nullcontext() if adapted is None else no_report()
    readable = library_errors(path_shown(source_path), f"a model of {model_class}", CheckpointError)
    with no_progress_bar(), quiet, readable:
        loads_as(model_class, checkpoint.config)  # which imports the class, and that fast
        model, report = auto.from_pretrained(
            str(checkpoint.folder),
            dtype=kept,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **({} if adapted is None else _adapted_class(adapted)),
        )
    lost = {*report["missing_keys"]}
    if adapted is not None:
        lost -= _apply_adapter(adapted, model)
    _refuse_missing(source_path, model, lost)
    loaded: nn.Module = model.eval()
    return loaded


def model_of(source: Checkpoint, model_class: str) -> nn.Module:
    """The model of a checkpoint that is seen in other shapes than it stores.

    Args:
        source: Its configuration and tensors are those of the model.
        model_class: A ``transformers`` auto class.

    Raises:
        InputError: If there is no such auto class.
        CheckpointError: If weights of the model are missing.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(**source.config)
    state = {name: source.read(name) for name in source.tensors}
    kept = widest_dtype(own for _, own in source.merged.values())
    with torch.device("meta"):
        built: Any = type(auto_class(model_class).from_config(config))
    with no_progress_bar():
        model, report = built.from_pretrained(
            None, config=config, state_dict=state, dtype=kept, output_loading_info=True
        )
    _refuse_missing(source.path, model, {*report["missing_keys"]})
    loaded: nn.Module = model.eval()
    return loaded


def check_builder(source_path: str, builder: str) -> None:
    """Refuse a function that builds another module than a checkpoint holds, from its headers.

    One that this process does not know is let pass, and so is one that cannot build without memory.

    Raises:
        InputError: If it needs arguments, or builds no module.
        CheckpointError: If the module has other tensors.
    """
    build = known(builder)
    if build is None:
        return
    _check_arguments(build, builder)
    try:
        with torch.device("meta"):
            model: Any = build()
    except Exception:  # whatever a function does that "meta" cannot: loading tells then
        return
    _check_module(model, open_checkpoint(source_path), builder)


def _check_arguments(build: Callable[..., Any], builder: str) -> None:
    """Refuse a function that cannot be called without arguments."""
    try:
        signature(build).bind()
    except TypeError as error:
        raise InputError(
            f"model class: expected {builder} to build the module without arguments, received: "
            f"{error}; give them defaults, or write a function around it"
        ) from None
    except ValueError:  # some built-in callables have no signature
        return


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
                f"{path_shown(checkpoint.path)}: tensor {shown(name)}: expected shape "
                f"{shapes.get(name, 'none: the module has no such tensor')} as {builder} builds "
                f"{type(model).__name__}, received {stored.get(name, 'none')}"
            )
    return model


def _diffusers_model(checkpoint: Checkpoint, dtype: str | None) -> nn.Module:
    """The model of a folder of diffusers, of the class that the folder names.

    Raises:
        CheckpointError: If diffusers lacks that class, or the folder lacks weights of the model.
    """
    found = diffusers_class(checkpoint.config, checkpoint.path)
    kept = widest_dtype([dtype] if dtype else (own for _, own in checkpoint.merged.values()))
    expected = f"weights of {found.__name__}"
    with library_errors(path_shown(checkpoint.path), expected, CheckpointError):
        model, report = found.from_pretrained(
            str(checkpoint.folder),
            torch_dtype=kept,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{path_shown(checkpoint.path)}: expected every weight of {type(model).__name__}, "
            f"missing {shown_names(report['missing_keys'])}; write the folder again by "
            "save_pretrained"
        )
    loaded: nn.Module = model.eval()
    return loaded


def _refuse_missing(source_path: str, model: nn.Module, names: set[str]) -> None:
    """Refuse a checkpoint that lacks weights of its model.

    Raises:
        CheckpointError: If there are any.
    """
    if names:
        raise CheckpointError(
            f"{path_shown(source_path)}: expected every weight of {type(model).__name__}, missing "
            f"{shown_names(names)}; choose the auto class that the checkpoint was trained with"
        )


def _adapted_class(checkpoint: AdaptedCheckpoint) -> dict[str, Any]:
    """Arguments that load a model for the head of an adapter, which takes the place of its own."""
    from transformers import CONFIG_MAPPING

    kind = checkpoint.config.get("model_type")
    if checkpoint.config == checkpoint.model.config or kind not in CONFIG_MAPPING:
        return {}
    config = CONFIG_MAPPING[kind].from_dict(dict(checkpoint.config))
    return {"config": config, "ignore_mismatched_sizes": True}


def _apply_adapter(checkpoint: AdaptedCheckpoint, model: nn.Module) -> set[str]:
    """Write what an adapter changes into its model.

    Returns:
        Names in the model of the parameters that were written.

    Raises:
        CheckpointError: If the model lacks one.
    """
    views = parameter_views(model)
    state = model.state_dict()
    for name in checkpoint.adapted:
        own = checkpoint.stored_as.get(name, name)
        if own not in views:
            raise CheckpointError(
                f"{path_shown(checkpoint.path)}: tensor {shown(own)}: expected a parameter of "
                f"{type(model).__name__}, found none; choose the auto class that the adapter was "
                "trained with"
            )
        views[own].of(state[views[own].parameter]).copy_(checkpoint.read(name))
    return {views[checkpoint.stored_as.get(name, name)].parameter for name in checkpoint.adapted}


@contextmanager
def no_report() -> Iterator[None]:
    """A context without transformers' account of weights that a folder lacks."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


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
