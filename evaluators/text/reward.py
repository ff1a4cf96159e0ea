"""Reward models: how often the chosen of two texts gets the higher reward.

The loss is that of Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs": -log
sigmoid(chosen - rejected).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mergesearch.evaluators.by_item import domain_names, wide
from mergesearch.evaluators.model_items import ModelItems, run_model
from mergesearch.evaluators.pooling import Pool
from mergesearch.evaluators.text.encoding import encoded, paired, second_texts
from mergesearch.evaluators.text.text_classification import TextClassification
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch


class Reward(TextClassification):
    """Scores a model that gives one number to a text.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        max_length: Tokens of an item at most; None takes what the tokenizer says.
        **by_item: Arguments of :class:`ByItem`; the columns are ``text`` for the chosen and
            ``pair`` for the rejected text.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})
    pooled: ClassVar[Mapping[str, Pool]] = {}

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        tokenizer = self._loaded()
        chosen, rejected = (
            encoded(tokenizer, columns[role], max_length=self._max_length)[0]
            for role in ("text", "pair")
        )
        return paired(chosen, rejected, domain_names(columns.get("domain"), len(columns["text"])))

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        import torch
        from torch.nn.functional import softplus

        pair = (items, second_texts(items))
        rewards = [wide(run_model(model, part)[0].logits) for part in pair]
        if rewards[0].shape[1] != 1:
            raise InputError(
                f"{self._where}: expected a model with one answer, the reward, found one with "
                f"{rewards[0].shape[1]} classes; use kind: text_classification"
            )
        margin = (rewards[0] - rewards[1])[:, 0]
        right = torch.where(torch.isfinite(margin), (margin > 0).to(margin.dtype), torch.nan)
        return {"accuracy": right, "cross_entropy": softplus(-margin)}
