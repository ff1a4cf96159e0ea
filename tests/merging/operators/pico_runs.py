"""Runs of data operators on pico models, with results by the stored names of tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mergesearch.merging import Field, Recipe, Source
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.arena import Arenas, open_arenas
from tests.merging.arenas import decoded


def rows_of(
    base: Path, experts: Sequence[Path], operator: str, folder: Path, **options: Any
) -> dict[str, Any]:
    """Stored name -> prepared rows ``(K, *shape)`` through the arenas, as a search reads them."""
    special = options.pop("special", ())
    arenas: Arenas = open_arenas(
        Recipe(
            Source("base", str(base)),
            tuple(Source(expert.name, str(expert)) for expert in experts),
            operator,
            Field.constant(1, [0.0]),
            tuple(sorted(options.items())),
            special=special,
        ),
        folder,
    )
    rows = decoded(arenas)[1]
    return {
        spec.name: torch.tensor(rows[:, spec.start : spec.stop]).view(-1, *spec.shape)
        for spec in arenas.layout.tensors
    }


def deltas_of(base: Path, experts: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Stored name -> task vectors ``(K, *shape)``."""
    origin = load_file(base / "model.safetensors")
    tensors = [load_file(expert / "model.safetensors") for expert in experts]
    return {
        name: torch.stack([own[name].float() - tensor.float() for own in tensors])
        for name, tensor in origin.items()
        if tensor.is_floating_point()
    }


def as_stored(
    model: Any, values: Mapping[str, torch.Tensor], folder: Path
) -> dict[str, torch.Tensor]:
    """``values`` by parameter name, by the names under which ``save_pretrained`` writes them."""
    holder = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, parameter in holder.named_parameters():
            parameter.copy_(values[name]) if name in values else parameter.zero_()
    holder.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def loaded(folder: Path, model_class: str) -> Any:
    """The model in ``folder``, in fp64."""
    return load_model(str(folder), model_class).double()
