"""Mean prediction entropy, which says how sure a model is of its answers, without labels.

Yang 2024, "AdaMerging: Adaptive Model Merging for Multi-Task Learning" (arXiv 2310.02575): H = -Σ_c
p_c log p_c in nats, averaged over the answers of an item (one for a classifier, one per token for a
language model), the items of a domain, and the domains. A model that is sure of wrong answers has a
low entropy too: judge by other objectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mergesearch.evaluators.by_item import ByItem, wide
from mergesearch.evaluators.model_items import ModelItems, item_means, read_items, run_model

if TYPE_CHECKING:
    import torch


class Entropy(ByItem):
    """Scores any model that gives logits.

    Args:
        model_class: The ``transformers`` auto class of the model.
        **by_item: Arguments of :class:`ByItem`.
    """

    deterministic = True
    smooth: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __init__(self, model_class: str, **by_item: Any) -> None:
        super().__init__(**by_item)
        self.model_class = model_class

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        return read_items(columns, self._where)

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        output, batch = run_model(model, items)
        log_p = wide(output.logits).log_softmax(dim=-1)
        return {"entropy": item_means(-(log_p.exp() * log_p).sum(dim=-1), batch)}
