"""Running statistics of batch normalisation, recomputed on data.

Jordan 2023, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair": the variance of
activations collapses in a merged model, and statistics that are recomputed on data restore it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergesearch.merging.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn


def recalibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    kept: Collection[str] = (),
) -> None:
    """Replace running statistics of ``model`` by exact averages over ``batches``.

    Every batch counts the same, so batches should be of one size. Layers see activations that are
    normalised by the batch, as in training; everything else of the model (dropout) stays in its
    mode. A model without running statistics is left alone, and nothing is run.

    Args:
        model: The merged model; only running statistics and their counters change.
        batches: Keyword arguments of the model.
        kept: Modules whose statistics stay what they are.

    Raises:
        InputError: If there is no batch, or one holds a single value per channel, which has no
            variance.
    """
    import torch

    layers = [
        module
        for name, module in model.named_modules()
        if _keeps_statistics(module) and name not in kept
    ]
    if not layers:
        return
    with _averaging(layers), torch.no_grad():
        number = 0
        for number, batch in enumerate(batches, start=1):
            _run(model, batch, number)
        if not number:
            raise InputError(
                "batch normalisation: expected batches to recompute running statistics on, "
                "received none"
            )


def _keeps_statistics(module: nn.Module) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm) and module.running_mean is not None


@contextmanager
def _averaging(layers: Sequence[Any]) -> Iterator[None]:
    """A context in which the layers collect a plain average from scratch.

    If it fails, what they had before comes back.
    """
    before = [
        (layer.momentum, layer.training, copy.deepcopy(layer.state_dict())) for layer in layers
    ]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's name for the average of all batches
            layer.train()
        yield
    except BaseException:
        for layer, (_, _, state) in zip(layers, before, strict=True):
            layer.load_state_dict(state)
        raise
    finally:
        for layer, (momentum, training, _) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.train(training)


def _run(model: nn.Module, batch: Mapping[str, torch.Tensor], number: int) -> None:
    try:
        model(**batch)
    except ValueError as error:
        # torch's message, from deep inside, names neither batch nor remedy.
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "batch normalisation: expected several values per channel in every batch, received one "
            f"in batch {number}; use larger batches"
        ) from error
