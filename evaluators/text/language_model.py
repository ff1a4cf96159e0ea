"""Next-token cross-entropy of a causal language model on token ids, in nats per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mergesearch.evaluators.by_item import ByItem, wide
from mergesearch.evaluators.model_items import ModelItems, padded, read_items, run_model
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch

#: Label of tokens that do not count, the one of transformers.
IGNORED = -100


class LanguageModel(ByItem):
    """Scores a causal language model; an item's score is the mean over its tokens that count."""

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
        from torch.nn.functional import cross_entropy

        output, _ = run_model(model, items)
        logits = wide(output.logits)[:, :-1]
        labels = padded(items.extra["labels"], IGNORED).to(logits.device)[:, 1:]
        losses = cross_entropy(
            logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
        )
        return {"cross_entropy": losses.sum(dim=1) / (labels != IGNORED).sum(dim=1)}
