"""Similarity of pairs of texts, as the cosine of their embeddings, against numbers of people.

Correlations say whether the order is right; the squared error, which has gradients, compares the
cosine with numbers that are scaled to 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mergesearch.evaluators.by_item import domain_names
from mergesearch.evaluators.metrics.correlation import pearson, spearman
from mergesearch.evaluators.model_items import ModelItems
from mergesearch.evaluators.pooling import Pool
from mergesearch.evaluators.text.embeddings import Pooling, embeddings, text_inputs
from mergesearch.evaluators.text.encoding import paired, second_texts
from mergesearch.evaluators.text.text_classification import TextClassification
from mergesearch.evaluators.transfer import to_device

if TYPE_CHECKING:
    import torch


class Similarity(TextClassification):
    """Scores an encoder on pairs of texts.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        pooling: How the states of tokens become one embedding.
        scale: Smallest and largest number, which stand for 0 and 1.
        **options: Arguments of :class:`TextClassification`; the columns are ``text``, ``pair`` and
            ``number``.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"squared_error"})
    pooled: ClassVar[Mapping[str, Pool]] = {"spearman": spearman, "pearson": pearson}
    model_class: str | None = "AutoModel"

    def __init__(
        self,
        tokenizer: str | None,
        *,
        pooling: Pooling = "mean",
        scale: tuple[float, float] = (0.0, 1.0),
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        self._pooling = pooling
        self._scale = scale

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        import torch

        tokenizer = self._loaded()
        one, two = (
            text_inputs(tokenizer, columns[role], "", self._max_length) for role in ("text", "pair")
        )
        low, high = self._scale
        numbers = (np.asarray(columns["number"], np.float32) - low) / (high - low)
        items = paired(one, two, domain_names(columns.get("domain"), len(numbers)))
        wanted = torch.from_numpy(np.ascontiguousarray(numbers, np.float32))
        return replace(items, extra={**items.extra, "number": wanted})

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        pair = (items, second_texts(items))
        one, two = (embeddings(model, part, self._pooling) for part in pair)
        numbers = items.extra["number"]
        assert not isinstance(numbers, list)
        return self._compared((one * two).sum(dim=1), to_device(numbers, one.device))
