"""Loads the merge of a bundle by its method: models of its folders, and tensors beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.safetensors_files import read_header
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.shown import path_shown
from mergesearch.merging.models.task_heads import TaskHead

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.routing.routed import Routed
    from mergesearch.merging.routing.vectors import LowRank

TENSORS = "routing.safetensors"


def _loaded(
    folder: Path, model_class: str, names: Sequence[str]
) -> tuple[nn.Module, TaskHead | None]:
    """The model of a folder, and the models with each of its heads, if it has several."""
    from mergesearch.merging.export.head_folders import head_names
    from mergesearch.merging.export.head_models import load_with_head
    from mergesearch.merging.models.loading import load_model
    from mergesearch.merging.models.own_heads import OwnHeads, share_alike

    if not names:
        return load_model(str(folder), model_class), None
    models = {name: load_with_head(folder, name, model_class) for name in names}
    first, *others = names
    for name in others:
        share_alike(models[first], models[name], head_names(folder, name))
    return models[first], OwnHeads(models)


def _load_t3(
    root: Path,
    routing: Mapping[str, Any],
    experts: Sequence[str],
    model_class: str,
    names: Sequence[str],
) -> Routed:
    from mergesearch.merging.routing.vectors import copied_tensors

    model, head = _loaded(root / "base", model_class, names)
    base = copied_tensors(model)
    expert, _ = _loaded(root / "expert", model_class, names[:1])
    return t3_of(model, base, copied_tensors(expert), routing, head)


def _load_twin(
    root: Path,
    routing: Mapping[str, Any],
    experts: Sequence[str],
    model_class: str,
    names: Sequence[str],
) -> Routed:
    from safetensors.torch import load_file

    from mergesearch.merging.models.task_heads import OwnHead
    from mergesearch.merging.routing.router import stored_router
    from mergesearch.merging.routing.twin_merging import TwinMerging
    from mergesearch.merging.routing.vectors import copied_tensors, without_heads

    model, head = _loaded(root / "shared", model_class, names)
    read_header(root / TENSORS)  # names what the library would stumble over
    stored = load_file(root / TENSORS)
    shared = without_heads(copied_tensors(model), head or OwnHead())
    with library_errors(path_shown(root / TENSORS), "the tensors of the bundle", CheckpointError):
        vectors = [
            {name: _low_rank(stored, f"exclusive.{k}.{name}", shared[name]) for name in shared}
            for k in range(len(experts))
        ]
        router = stored_router(stored, len(experts))
    return TwinMerging(
        model,
        shared,
        vectors,
        router,
        temperature=routing["temperature"],
        per=routing["per"],
        head=head,
    )


def _load_masked(
    root: Path,
    routing: Mapping[str, Any],
    experts: Sequence[str],
    model_class: str,
    names: Sequence[str],
) -> Routed:
    from mergesearch.merging.routing.masked_file import load_masked

    model, head = _loaded(root / "base", model_class, names)
    return load_masked(model, root / TENSORS, routing, experts, head)


def t3_of(
    model: Any, base: Any, expert: Any, routing: Mapping[str, Any], head: TaskHead | None = None
) -> Routed:
    """T3 with the parameters of a recipe's routing."""
    from mergesearch.merging.routing.t3 import T3

    return T3(
        model,
        base,
        expert,
        low=routing["lambda_min"],
        high=routing["lambda_max"],
        gamma=routing["gamma"],
        per=routing["per"],
        centred=routing["centred"],
        head=head,
    )


def _low_rank(stored: Mapping[str, torch.Tensor], key: str, like: torch.Tensor) -> LowRank:
    from mergesearch.merging.routing.vectors import LowRank

    return LowRank(stored[f"{key}.left"], stored.get(f"{key}.right"), tuple(like.shape))


#: Method -> what loads it.
LOADERS = {"t3": _load_t3, "twin_merging": _load_twin, "task_masks": _load_masked}
