"""Input-dependent merges as language models: the prompt of a text decides, once, how it is merged.

What is written after a prompt, or scored there, is then by that merge alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Candidate
from mergesearch.evaluators.model_items import ModelItems, padded
from mergesearch.evaluators.routing.routed import RoutedItems
from mergesearch.evaluators.routing.t3 import T3Rule
from mergesearch.evaluators.routing.twin_merging import TwinRule
from mergesearch.evaluators.text.generation import Generation
from mergesearch.evaluators.text.language_model import LanguageModel
from mergesearch.evaluators.text.text_items import TextItems
from mergesearch.evaluators.text.token_losses import IGNORED
from mergesearch.evaluators.text.writer import Written
from mergesearch.evaluators.transfer import to_device
from mergesearch.merging.models.task_heads import OwnHead, TaskHead

if TYPE_CHECKING:
    import torch


def padded_prompts(prompts: Sequence[torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Prompts ``(tokens,)`` as arguments of a model, padded on their right, and where they are."""
    import torch

    device = next(model.parameters()).device
    mask = padded([torch.ones_like(prompt) for prompt in prompts])
    return {
        "input_ids": to_device(padded([*prompts]), device),
        "attention_mask": to_device(mask, device),
    }


class OfTexts(RoutedItems, ABC):
    """The items of a language model, each of which begins with a prompt."""

    @abstractmethod
    def prompts(self, items: Any) -> list[torch.Tensor]:
        """Tokens ``(tokens,)`` of the prompt of each item, at least one."""

    def head_for(self, candidate: Candidate) -> TaskHead:
        """The model's own head."""
        return OwnHead()

    def arguments(self, model: Any, items: Any) -> Mapping[str, torch.Tensor]:
        """The prompts, padded on their right, and where they are."""
        return padded_prompts(self.prompts(items), model)

    def merged_parts(self, routed: Any, items: Any) -> Iterator[tuple[npt.NDArray[np.intp], Any]]:
        """Merge for some items after the other, and yield their indices and these items.

        They are decided about batch by batch, and the model of ``routed`` is theirs until the next.
        """
        every = np.arange(len(items.domains))
        for start in range(0, len(every), self._batch_size):
            rows = every[start : start + self._batch_size]
            weights = routed.weights_for(self.arguments(routed.model, items.rows(rows)))
            for chosen in routed.merges(weights):
                own = rows[chosen.cpu().numpy()]
                yield own, items.rows(own)


class OfGeneration(OfTexts, Generation):
    """Texts that are written after prompts."""

    def prompts(self, items: TextItems) -> list[torch.Tensor]:
        """All tokens that the model reads before it writes."""
        return items.tokens

    def written(self, model: Any, items: TextItems) -> list[Written]:
        """What is written after each prompt by the model that is merged for it."""
        if not hasattr(model, "item_weights"):
            return super().written(model, items)
        by_row: dict[int, Written] = {}
        for rows, part in self.merged_parts(model, items):
            by_row.update(zip(rows.tolist(), super().written(model.model, part), strict=True))
        return [by_row[row] for row in range(len(items.domains))]


class OfLanguageModel(OfTexts, LanguageModel):
    """Tokens that count, by the model that is merged for those before them."""

    def prompts(self, items: ModelItems) -> list[torch.Tensor]:
        """The tokens before the first that counts; the first token of a text never does."""
        pairs = zip(items.inputs["input_ids"], items.extra["labels"], strict=True)
        return [ids[: 1 + int((labels[1:] != IGNORED).nonzero()[0])] for ids, labels in pairs]

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        if not hasattr(model, "item_weights"):
            return super()._scores(model, items)
        scores: dict[str, torch.Tensor] = {}
        for rows, part in self.merged_parts(model, items):
            for metric, own in super()._scores(model.model, part).items():
                whole = scores.setdefault(metric, own.new_empty(len(items.domains)))
                whole[rows] = own
        return scores


class T3Generation(T3Rule, OfGeneration):
    """Scores texts that T3 writes."""


class T3LanguageModel(T3Rule, OfLanguageModel):
    """Scores T3 by the cross-entropy of tokens."""


class TwinMergingGeneration(TwinRule, OfGeneration):
    """Scores texts that Twin-Merging writes."""


class TwinMergingLanguageModel(TwinRule, OfLanguageModel):
    """Scores Twin-Merging by the cross-entropy of tokens."""


#: Method -> what scores the texts that it writes.
WRITTEN: Mapping[str, type[OfGeneration]] = {
    "t3": T3Generation,
    "twin_merging": TwinMergingGeneration,
}
#: Method -> what scores tokens by it.
SCORED: Mapping[str, type[OfLanguageModel]] = {
    "t3": T3LanguageModel,
    "twin_merging": TwinMergingLanguageModel,
}
