"""Loads the merge of a bundle by its method: models of its folders, and tensors beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Stored:
    """A bundle as its sheet describes it.

    Attributes:
        root: Its folder.
        routing: Of the recipe.
        experts: Their names.
        model_class: Auto class of the models.
        heads: Names of the heads of experts; empty where they share one.
    """

    root: Path
    routing: Mapping[str, Any]
    experts: Sequence[str]
    model_class: str
    heads: Sequence[str]

    @property
    def tensors(self) -> Path:
        """The file of what goes with the models."""
        return self.root / TENSORS

    def model(self, name: str) -> tuple[nn.Module, TaskHead | None]:
        """The model of a folder in it, and the models with each of its heads, if it has several."""
        from mergesearch.merging.export.head_folders import head_names
        from mergesearch.merging.export.head_models import load_with_head
        from mergesearch.merging.models.loading import load_model
        from mergesearch.merging.models.own_heads import OwnHeads, share_alike

        folder = self.root / name
        if not self.heads:
            return load_model(str(folder), self.model_class), None
        models = {head: load_with_head(folder, head, self.model_class) for head in self.heads}
        first, *others = self.heads
        for head in others:
            share_alike(models[first], models[head], head_names(folder, head))
        return models[first], OwnHeads(models)


def _load_t3(stored: Stored) -> Routed:
    from mergesearch.merging.routing.vectors import copied_tensors

    model, head = stored.model("base")
    base = copied_tensors(model)
    expert, _ = replace(stored, heads=stored.heads[:1]).model("expert")
    return t3_of(model, base, copied_tensors(expert), stored.routing, head)


def _load_twin(stored: Stored) -> Routed:
    from safetensors.torch import load_file

    from mergesearch.merging.models.task_heads import OwnHead
    from mergesearch.merging.routing.router import stored_router
    from mergesearch.merging.routing.twin_merging import TwinMerging
    from mergesearch.merging.routing.vectors import copied_tensors, without_heads

    model, head = stored.model("shared")
    read_header(stored.tensors)  # names what the library would stumble over
    tensors = load_file(stored.tensors)
    shared = without_heads(copied_tensors(model), head or OwnHead())
    where = path_shown(stored.tensors)
    with library_errors(where, "the tensors of the bundle", CheckpointError):
        vectors = [
            {name: _low_rank(tensors, f"exclusive.{k}.{name}", shared[name]) for name in shared}
            for k in range(len(stored.experts))
        ]
        router = stored_router(tensors, len(stored.experts))
    return TwinMerging(
        model,
        shared,
        vectors,
        router,
        temperature=stored.routing["temperature"],
        per=stored.routing["per"],
        head=head,
    )


def _load_masked(stored: Stored) -> Routed:
    from mergesearch.merging.routing.masked_file import load_masked

    model, head = stored.model("base")
    return load_masked(model, stored.tensors, stored.routing, stored.experts, head)


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


def _low_rank(tensors: Mapping[str, torch.Tensor], key: str, like: torch.Tensor) -> LowRank:
    from mergesearch.merging.routing.vectors import LowRank

    return LowRank(tensors[f"{key}.left"], tensors.get(f"{key}.right"), tuple(like.shape))


#: Method -> what loads it.
LOADERS: Mapping[str, Callable[[Stored], Routed]] = {
    "t3": _load_t3,
    "twin_merging": _load_twin,
    "task_masks": _load_masked,
}
