"""Next-token cross-entropy of a causal language model on token ids, in nats per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mergesearch.evaluators.by_item import ByItem
from mergesearch.evaluators.model_items import ModelItems, padded, read_items
from mergesearch.evaluators.text.token_losses import IGNORED, token_losses
from mergesearch.evaluators.transfer import to_device
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch


class LanguageModel(ByItem):
    """Scores a causal language model; an item's score is the mean over its tokens that count."""

    deterministic = True
    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})
    model_class: str | None = "AutoModelForCausalLM"

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        items = read_items(columns, self._where)
        inputs = dict(items.inputs)
        ids = inputs["input_ids"]
        labels = inputs.pop("labels", ids)
        for index, (row, wanted) in enumerate(zip(ids, labels, strict=True)):
            if len(row) != len(wanted) or not bool((wanted[1:] != IGNORED).any()):
                raise InputError(
                    f"{self._where}: item {index}: expected as many labels as tokens, and one "
                    f"beyond the first that counts, received {len(row)} tokens and labels "
                    f"{wanted.tolist()[:8]}"
                )
        return replace(items, inputs=inputs, extra={"labels": labels})

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        labels = padded(items.extra["labels"], IGNORED)[:, 1:]
        losses = token_losses(model, items, labels)
        counts = to_device((labels != IGNORED).sum(dim=1), losses.device)
        return {"cross_entropy": losses.sum(dim=1) / counts}
