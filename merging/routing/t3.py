"""T3: two models, interpolated by how much they disagree about an input (Imam 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mergesearch.merging.models.task_heads import TaskHead, Tasks, wide
from mergesearch.merging.routing.divergence import js_divergence, split_prompts
from mergesearch.merging.routing.prompts import IDS, MASK, prompt_means
from mergesearch.merging.routing.routed import Routed
from mergesearch.merging.routing.vectors import (
    Tensors,
)


class T3(Routed):
    """``(1 - λ) base + λ expert``, with λ by how much the predictions of the two diverge.

    ``λ(x) = low + (high - low) · sigmoid(gamma · JS(p_base ‖ p_expert))``. Divergences are not
    negative, so that the published sigmoid is never below 1/2; ``centred`` (ours, not the paper's)
    takes ``2 · sigmoid - 1``, by which models that agree get ``low``. Here λ weights the expert: a
    merge that defers to the base where the two disagree, as the paper describes, has
    ``high < low``. The paper has images alone; the JS of a text is the mean, over the tokens of its
    prompt, of the divergence of what the two expect next.

    Args:
        model: The model whose weights are written.
        base, expert: The two, by name in the model.
        low, high, gamma: Of the rule; ``lambda_min`` and ``lambda_max`` in the paper.
        per: ``item`` or ``batch`` (by the mean divergence).
        centred: See above.
        head: What answers by the model; None: the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Tensors,
        expert: Tensors,
        *,
        low: float,
        high: float,
        gamma: float,
        per: str = "item",
        centred: bool = False,
        head: TaskHead | None = None,
    ) -> None:
        super().__init__(model, per, head)
        self._base = base
        self._expert = expert
        self._low = low
        self._high = high
        self._gamma = gamma
        self._centred = centred

    def item_weights(self, inputs: Mapping[str, torch.Tensor], tasks: Tasks = None) -> torch.Tensor:
        """λ of every item: ``(items, 1)``.

        Where a batch is merged once, every item has that of the mean divergence.
        """
        if IDS in inputs:
            parts = split_prompts(self.model, inputs)
            apart = torch.cat([self._divergence(part, tasks) for part in parts])
        else:
            apart = self._divergence(inputs, tasks)
        if self.per == "batch":
            apart = apart.mean().expand_as(apart)
        return self.interpolation(apart)[:, None]

    def _divergence(self, inputs: Mapping[str, torch.Tensor], tasks: Tasks) -> torch.Tensor:
        """How far apart the predictions of the two are for each item ``(items,)``, in nats."""
        mask = inputs[MASK] if IDS in inputs else None
        predicted = []
        for source in (self._base, self._expert):
            self._load(source)
            logits = self.head.answer(self.model, inputs, tasks).logits
            predicted.append(logits if mask is None else logits[mask.bool()])
        apart = js_divergence(*predicted)
        return apart if mask is None else prompt_means(apart, mask)

    def interpolation(self, divergence: torch.Tensor) -> torch.Tensor:
        """λ at a divergence, of any shape."""
        share = torch.sigmoid(self._gamma * divergence)
        return self._low + (self._high - self._low) * (2 * share - 1 if self._centred else share)

    def merged_tensor(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """The interpolation of one tensor."""
        return torch.lerp(wide(self._base[name]), wide(self._expert[name]), weights[0])
