"""What infers the task of an item for a merge under task masks.

``head`` is MergeVLA's router (Fu 2025), which trains nothing: each task's own features, under its
own mask, are projected onto the leading right singular vectors of the first matrix of its head, and
the task with the longest projection is chosen. Here that matrix may be the classifier itself; the
paper's are the projections to values in the first block of the action expert that is not merged.

``learned`` is the router of Twin-Merging on features of the base, trained on a few first
observations of every task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mergesearch.merging.errors import InputError
from mergesearch.merging.models.own_heads import OwnHeads
from mergesearch.merging.models.task_heads import wide
from mergesearch.merging.routing.masked import MaskedMerge
from mergesearch.merging.routing.prompts import MASK
from mergesearch.merging.routing.router import train_router

#: Arguments of a model by name.
Inputs = Mapping[str, torch.Tensor]


class HeadRouter:
    """Compares the features of each task with what its own head reads.

    ``score_t(x) = ‖V_tᵀ h_t(x)‖``: ``h_t`` is the input of the head's first matrix under the mask
    of t, in the mean over tokens where there are several, and ``V_t`` the leading right singular
    vectors of that matrix.

    Args:
        head: The heads of all tasks.
        directions: Singular vectors of each head; 8 in the authors' code. Fewer where the matrix
            has fewer rows.

    Raises:
        InputError: If a head has no matrix.
    """

    def __init__(self, head: OwnHeads, directions: int) -> None:
        self._layers = {
            task: _first_matrix(model, head.private, task) for task, model in head.models.items()
        }
        self._spans = {
            task: torch.linalg.svd(wide(layer.weight.detach()), full_matrices=False)[2][:directions]
            for task, layer in self._layers.items()
        }

    def scores(self, merge: MaskedMerge, inputs: Inputs) -> torch.Tensor:
        """Lengths of projections ``(items, tasks)``."""
        found = []
        for task in merge.tasks:
            merge.write_task(task)
            seen = self._features(task, merge, inputs)
            found.append((seen @ self._spans[task].to(seen.device).T).norm(dim=1).cpu())
        return torch.stack(found, dim=1)

    def _features(self, task: str, merge: MaskedMerge, inputs: Inputs) -> torch.Tensor:
        """What the head of a task reads ``(items, width)``."""
        read: list[torch.Tensor] = []
        hook = self._layers[task].register_forward_pre_hook(
            lambda _layer, given: read.append(given[0])
        )
        try:
            merge.head.answer(merge.model, inputs, task)
        finally:
            hook.remove()
        seen = wide(read[0])
        mask = inputs.get(MASK)
        if mask is not None and mask.shape == seen.shape[:-1]:  # padding of texts does not count
            kept = mask.to(seen.device, seen.dtype)[:, :, None]
            return (seen * kept).sum(dim=1) / kept.sum(dim=1)
        return seen if seen.ndim == 2 else seen.flatten(1, -2).mean(dim=1)


def _first_matrix(model: nn.Module, private: frozenset[str], task: str) -> Any:
    """The first linear layer of a model whose weight is of its head."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if f"{name}.weight" in private and isinstance(weight, torch.Tensor) and weight.ndim == 2:
            return module
    raise InputError(
        f"head of {task!r}: expected a matrix, which the router compares features with, received "
        "none; tell the task of every item"
    )


class LearnedRouter:
    """A small network on the features of the base.

    Args:
        network: Its logits ``(items, tasks)``, from features ``(items, width)``.
    """

    def __init__(self, network: nn.Sequential) -> None:
        self.network = network

    def scores(self, merge: MaskedMerge, inputs: Inputs) -> torch.Tensor:
        """Logits ``(items, tasks)``."""
        merge.write_base()
        features = merge.head.features(merge.model, inputs)
        own = next(self.network.parameters())  # which stay where they were trained
        logits: torch.Tensor = self.network(features.to(own.device, own.dtype))
        return logits


def trained_router(
    merge: MaskedMerge, observed: Mapping[str, Inputs], *, width: int, steps: int, seed: int
) -> LearnedRouter:
    """A router that has learned which task an observation belongs to.

    Args:
        merge: Whose base makes the features.
        observed: Task -> first observations, as arguments of the model.
        width: Hidden width of the router.
        steps: Of its training, on all observations at once.
        seed: Of its first weights.
    """
    merge.write_base()
    with torch.no_grad():
        points = [merge.head.features(merge.model, observed[task]) for task in merge.tasks]
    labels = torch.cat([torch.full((len(own),), k) for k, own in enumerate(points)])
    network = train_router(
        torch.cat(points), labels, len(points), width=width, steps=steps, seed=seed
    )
    return LearnedRouter(network)


def untrained_router(merge: MaskedMerge, routing: Mapping[str, Any]) -> HeadRouter | None:
    """The router of a recipe's routing, where it needs no training, and heads are kept apart."""
    if routing["router"] != "head" or not isinstance(merge.head, OwnHeads):
        return None
    return HeadRouter(merge.head, routing["directions"])
