"""Accuracy, macro F1 and cross-entropy of a classifier of audio, which is arrays of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mergesearch.evaluators.by_item import ByItem, wide
from mergesearch.evaluators.metrics.answers import answer_scores, f1_counts, macro_f1
from mergesearch.evaluators.model_items import ModelItems, read_items, run_model
from mergesearch.evaluators.pooling import Pool
from mergesearch.evaluators.transfer import to_device

if TYPE_CHECKING:
    import torch


class AudioClassification(ByItem):
    """Scores a model with one answer for each recording; see :class:`ByItem` for its arguments.

    Columns are arguments of the model, such as ``input_values``, and ``label``.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})
    pooled: ClassVar[Mapping[str, Pool]] = {"f1": macro_f1}
    model_class: str | None = "AutoModelForAudioClassification"

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        import torch

        items = read_items(columns, self._where)
        labels = torch.from_numpy(np.ascontiguousarray(columns["label"], dtype=np.int64))
        return replace(items, extra={"label": labels})

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        import torch

        logits = wide(run_model(model, items)[0].logits)
        labels = items.extra["label"]
        assert not isinstance(labels, list)
        scores = answer_scores(logits, labels, f"{self._where}.label")
        if "f1" in self._wanted and not torch.is_grad_enabled():
            answers = logits.argmax(dim=1)[:, None]
            own = to_device(labels, logits.device)[:, None]
            every = torch.ones_like(own, dtype=torch.bool)
            scores |= {"f1": scores["accuracy"]}
            scores |= f1_counts("f1", answers, own, every, logits.shape[1])
        return scores
