"""Twin-Merging: a shared merge and what experts have beyond it, by a router (Lu 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mergesearch.merging.models.task_heads import TaskHead, Tasks, wide
from mergesearch.merging.routing.routed import Routed
from mergesearch.merging.routing.vectors import (
    LowRank,
    Tensors,
)


class TwinMerging(Routed):
    """``shared + Σ w_k v_k``, with weights w that a router gives for each item.

    w is the softmax of the router's logits, which it makes of the features of the shared model: its
    mean last hidden state (of a text, over the tokens of the prompt) or, with class prompts, the
    features of the image.

    Args:
        model: The model whose weights are written.
        shared: The shared merge, by name in the model.
        exclusive: What each expert has beyond it.
        router: Its logits, from features ``(items, width)``.
        temperature: Of the softmax; towards 0 the expert with the greatest logit alone counts.
        per: ``item`` or ``batch``.
        head: What answers by the model; None: the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: Tensors,
        exclusive: Sequence[Mapping[str, LowRank]],
        router: nn.Module,
        *,
        temperature: float,
        per: str = "item",
        head: TaskHead | None = None,
    ) -> None:
        super().__init__(model, per, head)
        self.exclusive = exclusive
        self.router = router
        self._shared = shared
        self._temperature = temperature
        self._dense = [
            {name: part.dense() for name, part in vector.items()} for vector in exclusive
        ]

    def item_weights(self, inputs: Mapping[str, torch.Tensor], tasks: Tasks = None) -> torch.Tensor:
        """The router's weights ``(items, experts)``; tasks make no difference to them."""
        self._load(self._shared)
        logits: torch.Tensor = self.router(self.head.features(self.model, inputs)).double()
        return torch.softmax(logits / self._temperature, dim=1)

    def merged_tensor(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """The shared tensor and the weighted exclusive ones."""
        total = wide(self._shared[name]).clone()
        for weight, vector in zip(weights, self._dense, strict=True):
            total.add_(vector[name], alpha=weight)
        return total
