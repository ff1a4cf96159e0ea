"""What an encoder-decoder writes for a text: chrF, ROUGE-L, exact match, and the cross-entropy.

Generation is greedy, so that a recipe writes the same each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mergesearch.evaluators.batching import item_batches
from mergesearch.evaluators.by_item import Array, domain_names
from mergesearch.evaluators.metrics.libraries import check_library
from mergesearch.evaluators.metrics.written import WRITTEN
from mergesearch.evaluators.model_items import ModelItems, generated
from mergesearch.evaluators.pooling import Pool
from mergesearch.evaluators.text.encoding import encoded
from mergesearch.evaluators.text.text_classification import TextClassification
from mergesearch.evaluators.text.token_losses import target_losses
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch


class SequenceToSequence(TextClassification):
    """Scores an encoder-decoder.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        max_length: Tokens of a text at most; None takes what the tokenizer says.
        max_new_tokens: Tokens that are written at most.
        prefix: Said before every text, such as ``translate: ``.
        **by_item: Arguments of :class:`ByItem`; the columns are ``text`` and ``target``.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})
    pooled: ClassVar[Mapping[str, Pool]] = {}
    model_class: str | None = "AutoModelForSeq2SeqLM"

    def __init__(
        self, tokenizer: str | None, *, max_new_tokens: int = 64, prefix: str = "", **options: Any
    ) -> None:
        super().__init__(tokenizer, **options)
        self._max_new_tokens = max_new_tokens
        self._prefix = prefix

    def check(self) -> None:
        """Check as for texts, and that the libraries of the metrics are there.

        Raises:
            InputError: In one line.
        """
        super().check()
        for metric in sorted(self._wanted & set(WRITTEN)):
            _, name = WRITTEN[metric]
            if name is not None:
                check_library(name, f"{self._where}.objectives: {metric}")

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        import torch

        wanted = columns["target"]
        if any(text is None for text in wanted):
            raise InputError(f"{self._where}.target: expected a text for every item, received none")
        texts = [f"{self._prefix}{text}" for text in columns["text"]]
        tokenizer = self._loaded()
        inputs, _ = encoded(tokenizer, texts, max_length=self._max_length)
        rows = tokenizer(text_target=list(wanted), verbose=False)["input_ids"]
        labels = [torch.tensor(row, dtype=torch.int64) for row in rows]
        domains = domain_names(columns.get("domain"), len(labels))
        extra = {"labels": labels, "wanted": list(wanted)}
        return ModelItems({"input_ids": inputs["input_ids"]}, domains, extra)

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``, of texts that are written if need be."""
        metrics = sorted(self._wanted & set(WRITTEN))
        scores = super()._item_scores(model, items) if "cross_entropy" in self._wanted else {}
        if metrics:
            written = self._written(model, items)
            for metric in metrics:
                score, _ = WRITTEN[metric]
                pairs = zip(written, items.extra["wanted"], strict=True)
                scores[metric] = np.array([score(text, wanted) for text, wanted in pairs])
        return scores

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        targets = items.extra["labels"]
        assert isinstance(targets, list)
        return {"cross_entropy": target_losses(model, items.arguments(model), targets)}

    def _written(self, model: Any, items: ModelItems) -> list[str]:
        """What the model writes for each item."""
        tokenizer = self._loaded()
        texts: list[str] = []
        for part in item_batches(items, self._batch_size):
            rows = generated(model, part.arguments(model), self._max_new_tokens)
            texts += tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts
