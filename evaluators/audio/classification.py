"""Accuracy, macro F1 and cross-entropy of a classifier of audio, which is arrays of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mergesearch.evaluators.by_item import ByItem, wide
from mergesearch.evaluators.metrics.answers import answer_scores, macro_f1
from mergesearch.evaluators.model_items import ModelItems, read_labelled, run_model
from mergesearch.evaluators.pooling import Pool

if TYPE_CHECKING:
    import torch


class AudioClassification(ByItem):
    """Scores a model with one answer for each recording; see :class:`ByItem` for its arguments.

    Columns are arguments of the model, such as ``input_values``, and ``label``.
    """

    deterministic = True
    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})
    pooled: ClassVar[Mapping[str, Pool]] = {"f1": macro_f1}
    model_class: str | None = "AutoModelForAudioClassification"

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        return read_labelled(columns, self._where)

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        import torch

        logits = wide(run_model(model, items)[0].logits)
        labels = items.extra["label"]
        assert not isinstance(labels, list)
        f1 = "f1" in self._wanted and not torch.is_grad_enabled()
        return answer_scores(logits, labels, f"{self._where}.label", f1=f1)
